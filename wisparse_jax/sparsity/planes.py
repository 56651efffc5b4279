"""What reading fewer planes of a weight loses, and the thresholds that go with every number of bits.

A plane of a layer is to the search what a layer is: it has gains, a curve of costs and a threshold of its own, and a
budget takes the steps of all planes of all layers that cost least per bit. The curves hold for every budget, so a plan
with them serves a range of bits: choosing one is arithmetic on these numbers, without a search and without text.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float64

from kernels_pallas.formats import FORMATS
from wisparse_jax.errors import PlanError
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.rules import ChannelRule, Rules
from wisparse_jax.sparsity.budget import cheapest
from wisparse_jax.sparsity.score import ChannelGains, score_weights

# The shares of a plane's channels that costs and thresholds are known at: denser where few channels are read.
LEVELS = np.array(
    [0, .025, .05, .075, .1, .15, .2, .25, .3, .35, .4, .45, .5, .55, .6, .65, .7, .75, .8, .85, .88, .91, .93, .95,
     .965, .98, .99, .995, .998]
)  # fmt: skip


class PlaneCurves(NamedTuple):
    """Of every plane of every layer, at each share of channels that it is not read for: the threshold, and the cost.

    Arrays are float64 with values that float32 holds, as which they are saved.
    """

    format: str  # of the weights, one that has planes
    levels: Float64[np.ndarray, " levels"]  # shares, ascending from 0
    thresholds: Float64[np.ndarray, "blocks 7 planes levels"]  # on the score, ascending
    costs: Float64[np.ndarray, "blocks 7 planes levels"]  # nats per token, second order, ascending from 0
    gains: list[ChannelGains]  # float32 [planes, in]

    @property
    def plane_bits(self) -> tuple[float, ...]:
        """What a weight takes of each plane's row, bits; the scales are read with the first."""
        return FORMATS[self.format].plane_bits

    @property
    def stored_bits(self) -> float:
        """What a weight takes when all planes are read."""
        return sum(self.plane_bits)

    @property
    def fewest_bits(self) -> float:
        """The least number of bits read that the curves reach."""
        return self.stored_bits * (1 - float(self.levels[-1]))

    def skipped(self, layer_weights: tuple[int, ...], target: float) -> Float64[np.ndarray, "blocks 7 planes"]:
        """The share of channels that each plane is not read for, of least predicted KL.

        Args:
            layer_weights: number of weights of each layer of a block.
            target: the share of the stored bits that is not read.

        Raises:
            PlanError: a target that the curves do not reach.
        """
        if not 0 <= target <= self.levels[-1]:
            raise PlanError(
                f"bits = {(1 - target) * self.stored_bits:.4g}: expected {self.fewest_bits:.3g} to "
                f"{self.stored_bits:.4g} of {self.format} weights"
            )
        shape = self.costs.shape[:3]
        sizes = np.broadcast_to(np.asarray(layer_weights, np.float64)[None, :, None] * self.plane_bits, shape)
        weights = (sizes / sizes.sum()).ravel()
        curves = self.costs.reshape(-1, len(self.levels))
        return cheapest(curves, self.levels, weights, target).reshape(shape)

    def layer_shares(self, skipped: Float64[np.ndarray, "blocks 7 planes"]) -> Float64[np.ndarray, "blocks 7"]:
        """The share of each layer's stored bits that is not read."""
        return skipped @ (np.asarray(self.plane_bits) / self.stored_bits)

    def predicted(self, skipped: Float64[np.ndarray, "blocks 7 planes"]) -> float:
        """The KL that the costs add up to, nats per token; what all planes lose together is not in it."""
        cells = np.ndindex(skipped.shape)
        return float(sum(np.interp(skipped[cell], self.levels, self.costs[cell]) for cell in cells))

    def thresholds_at(self, skipped: Float64[np.ndarray, "blocks 7 planes"]) -> Float64[np.ndarray, "blocks 7 planes"]:
        """The threshold of each plane, on its score; 0 where it is read for every channel."""
        out = np.zeros(skipped.shape)
        for cell in np.ndindex(skipped.shape):
            if skipped[cell] > 0:
                out[cell] = np.interp(skipped[cell], self.levels, self.thresholds[cell])
        return out

    def rules(self, layer_weights: tuple[int, ...], target: float) -> Rules:
        """What every layer reads at a target: plane k of channel i where `|x_i|` reaches thresholds of planes 0 to k.

        Args:
            layer_weights: number of weights of each layer of a block.
            target: the share of the stored bits that is not read.

        Raises:
            PlanError: a target that the curves do not reach.
        """
        thresholds = self.thresholds_at(self.skipped(layer_weights, target))
        return [
            {name: ChannelRule(plane_thresholds(gains[name], thresholds[b, i])) for i, name in enumerate(LAYERS)}
            for b, gains in enumerate(self.gains)
        ]


def check_curves(planes: PlaneCurves, blocks: int) -> None:
    """Refuse curves that are none.

    Raises:
        PlanError: the field, what was expected and what was found.
    """
    levels, count = planes.levels, len(planes.plane_bits)
    if levels.ndim != 1 or len(levels) < 2 or levels[0] != 0 or not (np.diff(levels) > 0).all() or not levels[-1] < 1:
        raise PlanError("planes.levels: expected shares that ascend from 0 and stay below 1")
    shape = (blocks, len(LAYERS), count, len(levels))
    for name in ("thresholds", "costs"):
        curves = getattr(planes, name)
        if curves.shape != shape:
            raise PlanError(f"planes.{name}: expected the shape {list(shape)}, found {list(curves.shape)}")
        if not (np.isfinite(curves).all() and (curves >= 0).all() and (np.diff(curves, axis=-1) >= 0).all()):
            raise PlanError(f"planes.{name}: expected finite numbers from 0 on that do not fall along the levels")


def plane_thresholds(
    gains: Float[Array, "planes in_channels"], thresholds: Float64[np.ndarray, " planes"]
) -> Float[Array, "planes in_channels"]:
    """The smallest |x_i| that each plane of each channel is read for; no plane without those above it."""
    own = jnp.asarray(thresholds, jnp.float32)[:, None] / score_weights(gains, jnp.float32(1.0))
    return lax.cummax(own, axis=0)
