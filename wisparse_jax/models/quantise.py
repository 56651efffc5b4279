"""int8 weights: symmetric, one scale per output channel, the block linears only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.fingerprint import model_fingerprint
from wisparse_jax.models.forward import Params
from wisparse_jax.models.llama import Llama

LARGEST = 127


@jax.jit
def quantise_kernel(
    kernel: Float[Array, "in_channels out"],
) -> tuple[Int8[Array, "in_channels out"], Float[Array, " out"]]:
    """`round(W / scale)` and `scale = max_i |W_ij| / 127`, so that no weight is off by more than half a scale."""
    wide = kernel.astype(jnp.float32)
    # A column of zeros has any scale.
    scale = jnp.maximum(jnp.abs(wide).max(axis=0), jnp.finfo(jnp.float32).tiny * LARGEST) / LARGEST
    return jnp.round(wide / scale).astype(jnp.int8), scale


def quantise_params(params: Params) -> Params:
    """The parameters with every block linear's kernel in int8 and its `scale` beside it; the rest is shared."""
    blocks = []
    for block in params["blocks"]:
        made = dict(block)
        for name in LAYERS:
            kernel, scale = quantise_kernel(block[name]["kernel"])
            made[name] = block[name] | {"kernel": kernel, "scale": scale}
        blocks.append(made)
    return params | {"blocks": blocks}


def quantise(model: Llama) -> Llama:
    """The model with int8 block linears; plans made for the model apply to it."""
    made = Llama.from_params(model.config, quantise_params(model.params))
    made.fingerprint, made.basis_digest = model_fingerprint(model), model.basis_digest
    return made
