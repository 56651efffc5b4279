"""The score, in one place (WiSparse, arXiv 2602.14452, section 3).

`s_i = |x_i| * max(g_i^alpha, 1e-4)` is kept when `s_i >= tau`, which is `|x_i| >= tau / max(g_i^alpha, 1e-4)`: where a
model runs, a layer is its weight and one float32 vector. `g_i` says what a unit of activation in channel i counts. The
paper's is `||W_i||_2`, the norm of the channel's weights; then alpha = 0 is TEAL's score and alpha = 1 WINA's. The
other is the root mean square of the gradient of the log-probability with respect to the channel's activation, which
`calibration` measures.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from kernels_pallas.weight import Weight
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.rules import BlockRules, ChannelRule

SCORE_FLOOR = 1e-4

# Layer name -> g of each input channel, float32 [in], or of each plane [planes, in].
ChannelGains = dict[str, Float[Array, "..."]]


@jax.jit
def channel_norms(
    kernel: Num[Array, "in_channels _"] | tuple[Num[Array, "in_channels _"], ...],
    scale: Num[Array, "..."] | None = None,
) -> Float[Array, " in_channels"]:
    """`||W_i||_2` of every input channel, in float32; kernel and scale are the values and scales of a `Weight`."""
    return jnp.sqrt(jnp.sum(jnp.square(Weight(kernel, scale).wide()), axis=1))


def model_norms(params: dict[str, Any]) -> list[ChannelGains]:
    """The channel norms of every block linear, block by block."""
    return [
        {name: channel_norms(block[name]["kernel"], block[name].get("scale")) for name in LAYERS}
        for block in params["blocks"]
    ]


def score_weights(
    gains: Float[Array, "*planes in_channels"], exponent: Float[Array, ""]
) -> Float[Array, "*planes in_channels"]:
    """`max(g_i^alpha, 1e-4)`: what multiplies |x_i| in the score."""
    return jnp.maximum(gains**exponent, SCORE_FLOOR)


def channel_thresholds(
    gains: Float[Array, " in_channels"], exponent: Float[Array, ""], threshold: Float[Array, ""]
) -> Float[Array, " in_channels"]:
    """The smallest |x_i| that is kept, per channel: `tau / max(g_i^alpha, 1e-4)`."""
    return threshold / score_weights(gains, exponent)


def block_rules(gains: ChannelGains, exponents: Float[Array, "7"], thresholds: Float[Array, "7"]) -> BlockRules:
    """The rules of a block's seven layers; exponents and thresholds on the score are in the order of `LAYERS`."""
    return {
        name: ChannelRule(channel_thresholds(gains[name], exponents[i], thresholds[i])) for i, name in enumerate(LAYERS)
    }
