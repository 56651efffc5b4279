"""Sparsity budgets of the layers inside a block, greedily, with the whole path recorded.

WiSparse (arXiv 2602.14452) Alg. 4, after TEAL (arXiv 2408.14690) Alg. 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from wisparse_jax.calibration.statistics import BlockStatistics
from wisparse_jax.models.config import LAYERS
from wisparse_jax.search.losses import BlockObjective

# A step that skips equal work would take a small layer (k, v) by a fifth of its channels at once.
LARGEST_STEP = 0.1


class Path(NamedTuple):
    """Layer sparsities after each step, from all zeros on, and the block errors."""

    sparsities: Float64[np.ndarray, "steps 7"]
    errors: Float64[np.ndarray, " steps"]

    def at(
        self, weights: Float64[np.ndarray, "7"], targets: Float64[np.ndarray, " targets"]
    ) -> Float64[np.ndarray, "targets 7"]:
        """The points whose weighted means are the targets, between two steps if need be.

        Raises:
            ValueError: the path ends before a target.
        """
        means = self.sparsities @ (weights / weights.sum())
        if np.max(targets) > means[-1] + 1e-9:
            raise ValueError(f"the path ends at sparsity {means[-1]:.4f}, before the target {np.max(targets):.4f}")
        return np.stack([np.interp(targets, means, column) for column in self.sparsities.T], axis=1)


def increments(weights: Float64[np.ndarray, "7"], step: float) -> Float64[np.ndarray, "7"]:
    """What one step adds to each layer's sparsity: `step` to the largest layer's, as much work to the others'."""
    return np.minimum(step * weights.max() / weights, LARGEST_STEP)


def greedy_path(
    loss: BlockObjective,
    statistics: BlockStatistics,
    exponents: Float64[np.ndarray, "7"],
    weights: Float64[np.ndarray, "7"],
    until: float,
    step: float,
    max_sparsity: float,
) -> Path:
    """From dense, give one more step to the layer whose step raises the block's output error least per weight skipped.

    A step adds `step` to the largest layer's sparsity and removes equal work from smaller ones, at most
    `LARGEST_STEP` of their channels.

    Returns:
        The path until its weighted mean reaches `until`; it serves every smaller target (`Path.at`).

    Raises:
        ValueError: `until` is above what `max_sparsity` of every layer allows.
    """
    if until > max_sparsity:
        raise ValueError(f"block sparsity {until} is above the largest layer sparsity {max_sparsity}")
    share = weights / weights.sum()
    steps = increments(weights, step)
    current = np.zeros(len(LAYERS))
    thresholds = statistics.thresholds(exponents, current)
    path, errors = [current], [0.0]
    while share @ current < until - 1e-12:
        grown = np.minimum(current + steps, max_sparsity)
        tries = np.tile(thresholds, (len(LAYERS), 1))
        np.fill_diagonal(tries, statistics.thresholds(exponents, grown))
        values = loss(np.tile(exponents, (len(LAYERS), 1)), tries)
        work = share * (grown - current)
        room = work > 1e-12
        cost = np.where(room, (values - errors[-1]) / np.where(room, work, 1.0), np.inf)
        best = int(np.argmin(cost))
        current, thresholds = current.copy(), tries[best]
        current[best] = grown[best]
        path.append(current)
        errors.append(float(values[best]))
    return Path(np.array(path), np.array(errors))
