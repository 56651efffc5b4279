"""Sparsity budgets: means weighted by parameter count, kept exact in float64."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64


def project_to_mean(
    values: Float64[np.ndarray, " n"],
    weights: Float64[np.ndarray, " n"],
    target: float,
    low: float = 0.0,
    high: float = 1.0,
) -> Float64[np.ndarray, " n"]:
    """The vector `clip(values + shift, low, high)` whose weighted mean is the target, to float64 rounding.

    Shifting every free entry by the same amount is the Euclidean projection onto the budget for equal weights.

    Raises:
        ValueError: the target is not between the bounds, or a value is not finite.
    """
    if not low <= target <= high:
        raise ValueError(f"target sparsity {target} is outside the bounds [{low}, {high}]")
    if not np.all(np.isfinite(values)):
        raise ValueError("a candidate budget is not finite")
    share = weights / weights.sum()

    def mean(shift: float) -> float:
        return float(share @ np.clip(values + shift, low, high))

    below, above = low - values.max(), high - values.min()
    for _ in range(100):
        middle = 0.5 * (below + above)
        below, above = (middle, above) if mean(middle) < target else (below, middle)
    out = np.clip(values + above, low, high)
    # What bisection leaves (about 1e-16) goes to the entries that can take it.
    free = (out > low) & (out < high)
    if free.any():
        out[free] = np.clip(out[free] + (target - share @ out) / share[free].sum(), low, high)
    return out
