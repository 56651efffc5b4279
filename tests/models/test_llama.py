"""The modules: their parameters, and that making them costs what the model's size does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wisparse_jax as ws
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.fingerprint import flat, model_fingerprint
from wisparse_jax.models.llama import Llama
from wisparse_jax.models.parameters import param_shapes
from wisparse_jax.testing import tiny_config

VARIANTS = {
    "plain": {},
    "tied, biases": {"tied_embeddings": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "norms of q and k": {"qk_norm": True, "qkv_bias": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_random_model_has_the_shapes_that_are_declared(variant: str, dtype: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    params, shapes = Llama(config, nnx.Rngs(0), dtype).params, param_shapes(config, dtype)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    assert all(
        (a.shape, a.dtype) == (b.shape, b.dtype) for a, b in zip(*map(jax.tree.leaves, (params, shapes)), strict=True)
    )
    assert len({id(block) for block in shapes["blocks"]}) == config.num_blocks
    for path, leaf in flat(params).items():
        if leaf.ndim == 2:
            assert 0.015 < float(jnp.std(leaf.astype(jnp.float32))) < 0.025, path
        else:
            np.testing.assert_array_equal(leaf, 0 if path.endswith("bias") else 1)
    kernels = [np.asarray(block[name]["kernel"], np.float32) for block in params["blocks"] for name in ("k", "v")]
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels)


def test_parameters_share_memory_with_the_module() -> None:
    config = tiny_config()
    params = Llama(config, nnx.Rngs(0)).params
    model = Llama.from_params(config, params)
    assert all(a is b for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(params), strict=True))
    block: Any = model.blocks[1]
    block.q.kernel[...] = jnp.zeros_like(params["blocks"][1]["q"]["kernel"])
    assert not model.params["blocks"][1]["q"]["kernel"].any() and params["blocks"][1]["q"]["kernel"].any()


def test_shapes_and_modules_of_a_deep_model_take_no_time() -> None:
    """250 blocks took 160 s when the shapes were traced; 20 times the blocks may take about 20 times as long."""
    config = tiny_config(num_blocks=250, windows=(None,) * 250)
    started = time.process_time()  # of this process: others may keep the machine busy
    shapes = param_shapes(config)
    one = jnp.zeros(())
    model = Llama.from_params(config, jax.tree.map(lambda _: one, shapes))
    assert len(model.params["blocks"]) == 250
    assert time.process_time() - started < 5


def test_a_fingerprint_is_that_of_the_checkpoint_until_the_weights_change(folder: Path) -> None:
    """Arrays do not change; a parameter that is set holds another one, and so the model is another one."""
    model = ws.load(folder)
    loaded, kernel = model_fingerprint(model), cast(Any, model.blocks[1]).down.kernel
    assert model.fingerprint == loaded
    before = kernel[...]
    kernel[...] = before.at[3, 5].add(1.0)  # not one of the elements that are sampled
    assert model.fingerprint is None
    kernel[...] = 2 * before
    assert model_fingerprint(model) != loaded
    kernel[...] = before + 0  # the same numbers in another array
    assert model.fingerprint is None and model_fingerprint(model) == loaded
    made = Llama.from_params(model.config, model.params)
    made.fingerprint = loaded
    assert made.fingerprint == loaded


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_plan_is_not_for_weights_that_were_changed_since(folder: Path, weights: str | None) -> None:
    model = ws.load(folder, weights=weights)
    zero = np.zeros((model.config.num_blocks, len(LAYERS)))
    sizes = model.config.layer_weights
    plan = ws.SparsityPlan("uniform", 0.0, zero, zero, zero, sizes, model_fingerprint(model), 0, zero)
    ws.apply(model, plan)
    norm = cast(Any, model.norm)
    norm[...] = norm[...] * 2
    with pytest.raises(ws.PlanError, match="plan is for another model"):
        ws.apply(model, plan)
