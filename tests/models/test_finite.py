"""Activations that overflow are named by block and layer."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from wisparse_jax.commands.texts import sampled_windows
from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import INPUT_GROUPS
from wisparse_jax.models.finite import check_activations
from wisparse_jax.models.model import Model


@pytest.mark.parametrize("bad", [*INPUT_GROUPS, "out"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_the_first_layer_that_is_not_finite_is_named(bad: str, value: float) -> None:
    fine = jnp.ones((1, 2, 4), jnp.bfloat16)
    inputs = dict.fromkeys(INPUT_GROUPS, fine)
    check_activations(5, inputs, fine)
    broken = fine.at[0, 1, 3].set(value)
    names = "the output" if bad == "out" else f"the input of layer {', '.join(INPUT_GROUPS[bad])}"
    message = f"block 5: {names} is not finite: expected numbers, found NaN or infinity; the dense model overflows in "
    with pytest.raises(WisparseError, match=re.escape(message + "bfloat16 on a text")):
        check_activations(5, inputs | ({} if bad == "out" else {bad: broken}), broken, "a text")


def test_a_model_that_overflows_is_not_said_to_repeat_itself(tiny_model: Model, tmp_path: Path) -> None:
    params = jax.tree.map(lambda leaf: leaf, tiny_model.params)
    params["blocks"] = jax.tree.map(lambda leaf: leaf * 3e37, params["blocks"])
    broken = Model(tiny_model.config, params)
    with pytest.raises(WisparseError, match=r"block 0: .* is not finite: .* the dense model overflows"):
        sampled_windows(broken, str(tmp_path), window=16, tokens=64, seed=0)
