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


def cheapest(
    curves: Float64[np.ndarray, "layers levels"],
    levels: Float64[np.ndarray, " levels"],
    weights: Float64[np.ndarray, " layers"],
    target: float,
) -> Float64[np.ndarray, " layers"]:
    """The sparsities whose costs, on the lower hulls of their curves, have the least sum.

    The steps of the hulls are taken by what they cost per weight, the cheapest first, the last one in part.

    Args:
        curves: cost of each layer at each level, 0 at level 0.
        levels: ascending, from 0.
        weights: of each layer in the mean; they add up to 1.
        target: the mean sparsity.

    Raises:
        ValueError: a target above the last level, or costs that are not finite.
    """
    if not 0 <= target <= levels[-1] + 1e-12:
        raise ValueError(f"target sparsity {target} is outside [0, {levels[-1]:g}]")
    if not np.isfinite(curves).all():
        raise ValueError("a layer's cost is not finite")
    hulls = np.stack([lower_hull(levels, curve) for curve in curves])
    slopes = np.diff(hulls, axis=1) / np.diff(levels) / weights[:, None]
    # Slopes of a hull ascend but for rounding: a layer's steps must come in their order.
    order = np.argsort(np.maximum.accumulate(slopes, axis=1), axis=None, kind="stable")
    out, left = np.zeros(len(weights)), target
    for layer, step in zip(*np.unravel_index(order, slopes.shape), strict=True):
        width = levels[step + 1] - levels[step]
        taken = min(width, left / weights[layer])
        out[layer] += taken
        left -= taken * weights[layer]
        if taken < width:
            break
    return out


def lower_hull(x: Float64[np.ndarray, " points"], y: Float64[np.ndarray, " points"]) -> Float64[np.ndarray, " points"]:
    """The greatest convex function below the points, at each x."""
    corners = [0]
    for j in range(1, len(x)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (y[b] - y[a]) * (x[j] - x[b]) < (y[j] - y[b]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(j)
    return np.interp(x, x[corners], y[corners])
