import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

SLOT, SEQUENCES = 199, 3


@pytest.fixture(scope="session")
def triton():
    """The Triton kernels: compiled where there is a GPU, interpreted elsewhere."""
    return {"implementation": "triton", "interpret": jax.default_backend() != "gpu"}


class RealBlock(NamedTuple):
    """What one block of the demo model meets at slot `SLOT` of three texts that the model wrote."""

    params: Any
    x: Any  # the residual stream, [sequences, hidden]
    cache: Any
    cos: Any
    sin: Any
    thresholds: Any  # layer -> the thresholds at which it skips half of its channels in these texts
    inputs: Any  # layer -> its input in the dense model, [sequences, in]


@pytest.fixture(scope="session")
def real_block(demo, demo_text):
    """`real_block(weights, index)`; int8 and int4 weights come with activations in bfloat16."""
    from wisparse_jax.models.forward import block, layout
    from wisparse_jax.models.quantise import quantise_params
    from wisparse_jax.sparsity.score import channel_norms, channel_thresholds

    tokens = demo_text["calibration"][:SEQUENCES, : SLOT + 1]

    @functools.cache
    def made(weights, index):
        dtype = jnp.float32 if weights == "float32" else jnp.bfloat16
        config, params = demo.config, jax.tree.map(lambda w: w.astype(dtype), demo.params)
        params = quantise_params(params, weights) if weights in ("int8", "int4") else params
        where, own = layout(config, SEQUENCES, SLOT + 1), params["blocks"][index]

        @jax.jit
        def run(weights, x):
            record = {}
            x, cache = block(config, None, weights, x, where, record=record)
            return x, cache, record

        x = params["embed"][tokens]
        for before in params["blocks"][:index]:
            x, _, _ = run(before, x)
        _, cache, record = run(own, x)
        thresholds = {}
        for name, inputs in record.items():
            norms = channel_norms(own[name]["kernel"], own[name].get("scale"))
            scores = jnp.abs(inputs).astype(jnp.float32) * norms[None, None]
            thresholds[name] = channel_thresholds(norms, jnp.float32(1), jnp.median(scores))
        last = {name: inputs[:, -1] for name, inputs in record.items()}
        return RealBlock(own, x[:, -1], cache, where.cos[:, -1], where.sin[:, -1], thresholds, last)

    return made
