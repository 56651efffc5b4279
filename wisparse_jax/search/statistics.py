"""Score quantiles, taken from the sampled activations themselves."""

from __future__ import annotations

import dataclasses

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
    # Each layer's sorted scores and the exponent that they are for: one entry a layer bounds the memory.
    _sorted: dict[str, tuple[float, np.ndarray]] = dataclasses.field(default_factory=dict)

    def scores(self, layer: str, exponent: float) -> Float32[np.ndarray, " scores"]:
        """All scores `|x_i| * max(||W_i||^alpha, 1e-4)` of the layer."""
        weight = np.maximum(self.norms[layer] ** np.float32(exponent), np.float32(SCORE_FLOOR))
        return (self.samples[GROUP_OF[layer]] * weight).ravel()

    def sorted_scores(self, layer: str, exponent: float) -> Float32[np.ndarray, " scores"]:
        """The same, ascending; kept until another exponent is asked for."""
        if layer not in self._sorted or self._sorted[layer][0] != exponent:
            self._sorted[layer] = (exponent, np.sort(self.scores(layer, exponent)))
        return self._sorted[layer][1]

    def threshold(self, layer: str, exponent: float, sparsity: float) -> float:
        """tau such that the share `sparsity` of the sampled scores lies below it, without sorting them.

        Raises:
            ValueError: a sparsity outside [0, 1].
        """
        scores = self.scores(layer, exponent)
        place = _place(layer, sparsity, len(scores))
        return 0.0 if place is None else float(np.partition(scores, place)[place])

    def thresholds(
        self, exponents: Float64[np.ndarray, "7"], sparsities: Float64[np.ndarray, "*candidates 7"]
    ) -> Float64[np.ndarray, "*candidates 7"]:
        """tau of all seven layers, for one or many vectors of sparsities."""
        rows = sparsities.reshape(-1, len(LAYERS))
        taus = np.zeros(rows.shape)
        for i, layer in enumerate(LAYERS):
            scores = self.sorted_scores(layer, float(exponents[i]))
            for row, sparsity in enumerate(rows[:, i]):
                place = _place(layer, float(sparsity), len(scores))
                taus[row, i] = 0.0 if place is None else scores[place]
        return taus.reshape(sparsities.shape)


def _place(layer: str, sparsity: float, count: int) -> int | None:
    """Which of the ascending scores is the threshold; None keeps all."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"{layer}: sparsity {sparsity} is outside [0, 1]")
    skipped = round(sparsity * count)
    return min(skipped, count - 1) if skipped else None
