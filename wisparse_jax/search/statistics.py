"""Score quantiles, taken from the sampled activations themselves."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Float32, Float64

from wisparse_jax.models.config import INPUT_GROUPS, LAYERS
from wisparse_jax.sparsity.score import SCORE_FLOOR

GROUP_OF = {layer: group for group, layers in INPUT_GROUPS.items() for layer in layers}


@dataclasses.dataclass(frozen=True, eq=False)
class BlockStatistics:
    """Sampled `|x|` of a block's four linear inputs, and the channel norms of its seven layers."""

    samples: dict[str, Float32[np.ndarray, "tokens in_channels"]]
    norms: dict[str, Float32[np.ndarray, " in_channels"]]

    @functools.lru_cache(maxsize=16)  # noqa: B019 - an entry lives as long as its block's statistics are in use
    def sorted_scores(self, layer: str, exponent: float) -> Float32[np.ndarray, " scores"]:
        """All scores `|x_i| * max(||W_i||^alpha, 1e-4)` of the layer, ascending."""
        weight = np.maximum(self.norms[layer] ** np.float32(exponent), np.float32(SCORE_FLOOR))
        return np.sort((self.samples[GROUP_OF[layer]] * weight).ravel())

    def threshold(self, layer: str, exponent: float, sparsity: float) -> float:
        """tau such that the share `sparsity` of the sampled scores lies below it.

        Raises:
            ValueError: a sparsity outside [0, 1].
        """
        if not 0 <= sparsity <= 1:
            raise ValueError(f"{layer}: sparsity {sparsity} is outside [0, 1]")
        scores = self.sorted_scores(layer, exponent)
        skipped = round(sparsity * len(scores))
        return float(scores[skipped]) if 0 < skipped < len(scores) else 0.0 if not skipped else float(scores[-1])

    def thresholds(
        self, exponents: Float64[np.ndarray, "7"], sparsities: Float64[np.ndarray, "*candidates 7"]
    ) -> Float64[np.ndarray, "*candidates 7"]:
        """tau of all seven layers, for one or many vectors of sparsities."""
        rows = sparsities.reshape(-1, len(LAYERS))
        taus = [[self.threshold(n, float(exponents[i]), float(p[i])) for i, n in enumerate(LAYERS)] for p in rows]
        return np.asarray(taus, np.float64).reshape(sparsities.shape)
