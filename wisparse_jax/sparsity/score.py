"""The weight-aware score, and the per-channel thresholds that apply it (WiSparse, arXiv 2602.14452, section 3).

`s_i = |x_i| * max(||W_i||^alpha, 1e-4)` is kept when `s_i >= tau`, which is `|x_i| >= tau / max(||W_i||^alpha, 1e-4)`:
at inference a layer is its weight and one float32 vector. alpha = 0 is TEAL's score, alpha = 1 WINA's.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from kernels_pallas.weight import Weight
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.forward import BlockThresholds

SCORE_FLOOR = 1e-4

# Layer name -> the L2 norm of each input channel's weights, float32 [in].
BlockNorms = dict[str, Float[Array, "_"]]


@jax.jit
def channel_norms(
    kernel: Num[Array, "in_channels _"], scale: Num[Array, "..."] | None = None
) -> Float[Array, " in_channels"]:
    """`||W_i||_2` of every input channel, in float32; the scale is that of an int8 or int4 kernel."""
    return jnp.sqrt(jnp.sum(jnp.square(Weight(kernel, scale).wide()), axis=1))


def model_norms(params: dict[str, Any]) -> list[BlockNorms]:
    """The channel norms of every block linear, block by block."""
    return [
        {name: channel_norms(block[name]["kernel"], block[name].get("scale")) for name in LAYERS}
        for block in params["blocks"]
    ]


def weight_scores(norms: Float[Array, " in_channels"], exponent: Float[Array, ""]) -> Float[Array, " in_channels"]:
    """`max(||W_i||^alpha, 1e-4)`: what a unit of activation in channel i counts."""
    return jnp.maximum(norms**exponent, SCORE_FLOOR)


def channel_thresholds(
    norms: Float[Array, " in_channels"], exponent: Float[Array, ""], tau: Float[Array, ""]
) -> Float[Array, " in_channels"]:
    """The smallest |x_i| that is kept, per channel: `tau / max(||W_i||^alpha, 1e-4)`."""
    return tau / weight_scores(norms, exponent)


def block_thresholds(norms: BlockNorms, exponents: Float[Array, "7"], taus: Float[Array, "7"]) -> BlockThresholds:
    """The thresholds of a block's seven layers, given in the order of `LAYERS`."""
    return {name: channel_thresholds(norms[name], exponents[i], taus[i]) for i, name in enumerate(LAYERS)}
