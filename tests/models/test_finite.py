"""Activations that overflow are named by block and layer."""

from __future__ import annotations

import re

import jax.numpy as jnp
import pytest

from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import INPUT_GROUPS
from wisparse_jax.models.finite import check_activations


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
