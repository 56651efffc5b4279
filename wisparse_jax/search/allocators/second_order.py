"""Budgets over all layers of the model at once, from their second-order costs.

Costs add up over layers, so the best budget takes steps of sparsity by what they cost per weight, the cheapest first;
on the lower convex hulls of the cost curves that is exact, and one step at the end is taken in part.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from wisparse_jax.search.problem import Allocation, BudgetProblem


def second_order(problem: BudgetProblem) -> Allocation:
    """The budget of least predicted KL."""
    weights = np.tile(problem.weights / problem.weights.sum() / problem.blocks, problem.blocks)
    curves = problem.costs.reshape(-1, len(problem.levels))
    found = cheapest(curves, problem.levels, weights, problem.target).reshape(problem.blocks, -1)
    return Allocation(found, {"predicted": problem.predicted(found)})


def cheapest(
    curves: Float64[np.ndarray, "layers levels"],
    levels: Float64[np.ndarray, " levels"],
    weights: Float64[np.ndarray, " layers"],
    target: float,
) -> Float64[np.ndarray, " layers"]:
    """The sparsities whose costs, on the lower hulls of their curves, have the least sum.

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
