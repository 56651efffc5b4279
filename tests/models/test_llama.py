"""The modules: their parameters, and that making them costs what the model's size does."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wisparse_jax.models.fingerprint import flat
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
    started = time.perf_counter()
    shapes = param_shapes(config)
    one = jnp.zeros(())
    model = Llama.from_params(config, jax.tree.map(lambda _: one, shapes))
    assert len(model.params["blocks"]) == 250
    assert time.perf_counter() - started < 5
