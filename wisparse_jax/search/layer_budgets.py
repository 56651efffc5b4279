"""Sparsity budgets of the layers inside a block, greedily, with the whole path recorded.

WiSparse (arXiv 2602.14452) Alg. 4, after TEAL (arXiv 2408.14690) Alg. 1.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from wisparse_jax.models.config import LAYERS
from wisparse_jax.search.objectives import BlockObjective
from wisparse_jax.search.statistics import BlockStatistics

# A step that skips equal work would take a small layer (k, v) by a fifth of its channels at once.
LARGEST_STEP = 0.1


def greedy_path(
    loss: BlockObjective,
    statistics: BlockStatistics,
    exponents: Float64[np.ndarray, "7"],
    weights: Float64[np.ndarray, "7"],
    until: float,
    step: float,
    max_sparsity: float,
) -> tuple[Float64[np.ndarray, "steps 7"], Float64[np.ndarray, " steps"]]:
    """From dense, give one more step to the layer whose step raises the block's output error least per weight skipped.

    A step adds `step` to the largest layer's sparsity and removes equal work from smaller ones, at most
    `LARGEST_STEP` of their channels.

    Returns:
        The sparsities after each step, from all zeros until their weighted mean reaches `until`, and the block errors.
        One path serves every smaller target (`on_path`).

    Raises:
        ValueError: `until` is above what `max_sparsity` of every layer allows.
    """
    if until > max_sparsity:
        raise ValueError(f"block sparsity {until} is above the largest layer sparsity {max_sparsity}")
    share = weights / weights.sum()
    increments = np.minimum(step * weights.max() / weights, LARGEST_STEP)
    current = np.zeros(len(LAYERS))
    taus = statistics.thresholds(exponents, current)
    path, errors = [current], [0.0]
    while share @ current < until - 1e-12:
        grown = np.minimum(current + increments, max_sparsity)
        tries = np.tile(taus, (len(LAYERS), 1))
        np.fill_diagonal(tries, statistics.thresholds(exponents, grown))
        values = loss(np.tile(exponents, (len(LAYERS), 1)), tries)
        work = share * (grown - current)
        room = work > 1e-12
        cost = np.where(room, (values - errors[-1]) / np.where(room, work, 1.0), np.inf)
        best = int(np.argmin(cost))
        current, taus = current.copy(), tries[best]
        current[best] = grown[best]
        path.append(current)
        errors.append(float(values[best]))
    return np.array(path), np.array(errors)


def on_path(
    path: Float64[np.ndarray, "steps 7"], weights: Float64[np.ndarray, "7"], target: float
) -> Float64[np.ndarray, "7"]:
    """The point of a greedy path whose weighted mean is the target, between two steps if need be.

    Raises:
        ValueError: the path ends before the target.
    """
    means = path @ (weights / weights.sum())
    if target > means[-1] + 1e-9:
        raise ValueError(f"the path ends at sparsity {means[-1]:.4f}, before the target {target:.4f}")
    after = min(int(np.searchsorted(means, target)), len(path) - 1)
    if after == 0:
        return path[0].copy()
    before = after - 1
    t = min(1.0, (target - means[before]) / (means[after] - means[before]))
    return path[before] + t * (path[after] - path[before])
