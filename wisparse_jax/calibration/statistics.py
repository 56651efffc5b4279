"""Score quantiles of sampled activations, computed where the activations are."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Float64

from wisparse_jax.models.config import INPUT_GROUPS, LAYERS
from wisparse_jax.models.mesh import on_host
from wisparse_jax.sparsity.score import ChannelGains, score_weights

GROUP_OF = {layer: group for group, layers in INPUT_GROUPS.items() for layer in layers}
# Steps of a quantile table; between two of them it is interpolated. The thresholds of a finished plan are not from it.
STEPS = 4096
_LARGEST = 0x7F800000  # the bits of infinity
# Scores that are sorted at most; beyond it, evenly spaced tokens stand for all, unless they become too few.
LARGEST_SORT = 1 << 20
FEWEST_TOKENS = 1024  # that stand for all: the scores of one token are alike, so that fewer would set a quantile badly


@dataclasses.dataclass(frozen=True, eq=False)
class BlockStatistics:
    """Sampled `|x|` of a block's four linear inputs, on the device, and the channel gains of its seven layers."""

    samples: dict[str, Float[Array, "tokens in_channels"]]
    gains: ChannelGains
    # Quantile tables by layer and exponent: 16 KB each.
    _tables: dict[tuple[str, float], np.ndarray] = dataclasses.field(default_factory=dict)

    def table(self, layer: str, exponent: float) -> Float32[np.ndarray, " steps"]:
        """The quantiles 0, 1/4096, ..., 1 of the layer's scores `|x_i| * max(g_i^alpha, 1e-4)`."""
        key = (layer, float(exponent))
        if key not in self._tables:
            scores = _scores(self.samples[GROUP_OF[layer]], self.gains[layer], jnp.float32(exponent))
            # XLA's sort on a CPU takes five times NumPy's.
            ordered = np.sort(on_host(scores)) if jax.default_backend() == "cpu" else jnp.sort(scores)
            places = [min(k * scores.size // STEPS, scores.size - 1) for k in range(STEPS + 1)]
            self._tables[key] = on_host(ordered[np.asarray(places, np.int64)])
        return self._tables[key]

    def threshold(self, layer: str, exponent: float, sparsity: float) -> float:
        """The threshold (tau) that about the share `sparsity` of the sampled scores lies below; 0 keeps all.

        Raises:
            ValueError: a sparsity outside [0, 1].
        """
        if not 0 <= sparsity <= 1:
            raise ValueError(f"{layer}: sparsity {sparsity} is outside [0, 1]")
        return float(_look_up(self.table(layer, exponent), np.float64(sparsity)))

    def thresholds(
        self, exponents: Float64[np.ndarray, "7"], sparsities: Float64[np.ndarray, "*candidates 7"]
    ) -> Float64[np.ndarray, "*candidates 7"]:
        """The thresholds (tau) of all seven layers, in units of the score, for one or many vectors of sparsities."""
        thresholds = np.zeros(sparsities.shape)
        for i, layer in enumerate(LAYERS):
            thresholds[..., i] = _look_up(self.table(layer, float(exponents[i])), sparsities[..., i])
        return thresholds


@jax.jit
def _scores(
    samples: Float[Array, "tokens in_channels"], gains: Float[Array, " in_channels"], exponent: Float[Array, ""]
) -> Float[Array, " scores"]:
    return (samples.astype(jnp.float32) * score_weights(gains, exponent)[None]).ravel()


def _look_up(table: np.ndarray, sparsities: np.ndarray | np.float64) -> np.ndarray:
    at = np.asarray(sparsities, np.float64) * STEPS
    return np.where(at > 0, np.interp(at, np.arange(STEPS + 1), table.astype(np.float64)), 0.0)


def spaced_tokens(tokens: int, channels: int) -> slice:
    """Evenly spaced ones of the tokens, few enough to sort all their scores."""
    return slice(None, None, max(1, min(-(-tokens * channels // LARGEST_SORT), tokens // FEWEST_TOKENS)))


def threshold_between(
    scores: Float[Array, " scores"], sparsity: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """A threshold between two of the scores, and the share of them below it; to be called inside a jit.

    The share is `sparsity` to one score where no scores are equal. Equal ones are kept or skipped together, whichever
    is closer to what is asked; scores of 0 are always skipped, which costs nothing, unless `sparsity` is 0: that keeps
    everything.
    """
    # Numbers from 0 on are ordered as their bits are: bisection over these finds the edge without sorting.
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
    wanted = jnp.round(sparsity * bits.size).astype(jnp.int32)

    def halve(_: Array | int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(bits <= middle, dtype=jnp.int32) >= wanted
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    edge, _ = lax.fori_loop(0, 31, halve, (jnp.int32(0), jnp.int32(_LARGEST)))  # the largest score to be skipped
    first, behind = jnp.sum(bits < edge, dtype=jnp.int32), jnp.sum(bits <= edge, dtype=jnp.int32)
    together = (edge == 0) | (behind - wanted <= wanted - first)
    skipped = jnp.where(together, behind, first)
    below = jnp.where(together, edge, jnp.max(jnp.where(bits < edge, bits, 0)))
    above = jnp.where(together, jnp.min(jnp.where(bits > edge, bits, _LARGEST)), edge)
    low, high = (lax.bitcast_convert_type(bound, jnp.float32) for bound in (below, above))
    high = jnp.where(above == _LARGEST, 2 * low + 1, high)
    middle = low + 0.5 * (high - low)
    threshold = jnp.where(middle > low, middle, high)
    none = (wanted < 1) | (skipped < 1)
    return jnp.where(none, 0.0, threshold), jnp.where(none, 0.0, skipped / bits.size)
