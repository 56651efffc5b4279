"""Sparsity budgets of the blocks by an evolution strategy on the model's KL divergence (WiSparse, Alg. 3).

The paper's own evolution moves single blocks by 0.005, less than the roughness of the loss, and forgets its parent;
a distribution over all blocks at once (evosax) with the best candidate kept finds more in fewer evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Float64

from wisparse_jax.search.settings import SearchSettings
from wisparse_jax.sparsity.budget import project_to_mean

Fitness = Callable[[Float64[np.ndarray, "candidates blocks"]], Float64[np.ndarray, " candidates"]]


def evolve_block_budgets(
    fitness: Fitness,
    weights: Float64[np.ndarray, " blocks"],
    target: float,
    settings: SearchSettings,
    seed: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[Float64[np.ndarray, " blocks"], dict[str, Any]]:
    """The block sparsities of least fitness found, their weighted mean the target.

    Every candidate is projected onto the budget (`project_to_mean`) before it is evaluated; the uniform budget is a
    candidate, so the result is never worse than it on the calibration text.

    Returns:
        The best budget, and the history: the uniform fitness, the best of each generation, and the evaluations.
    """
    import evosax.algorithms
    import jax
    import jax.numpy as jnp

    blocks = len(weights)
    best = np.full(blocks, target)
    if blocks == 1:
        return best, {"uniform": None, "best": [], "evaluations": 0}
    strategy = getattr(evosax.algorithms, settings.algorithm)(settings.population, jnp.zeros(blocks))
    params = strategy.default_params.replace(std_init=settings.initial_std)
    key, start = jax.random.split(jax.random.key(seed))
    state = strategy.init(start, jnp.zeros(blocks), params)

    def budgets(candidates: np.ndarray) -> np.ndarray:
        return np.stack(
            [project_to_mean(target + row, weights, target, 0.0, settings.max_sparsity) for row in candidates]
        )

    least = uniform = float(fitness(np.tile(best, (settings.population, 1)))[0])
    curve: list[float] = []
    for _ in progress(range(settings.generations)):
        key, ask, tell = jax.random.split(key, 3)
        moves, state = strategy.ask(ask, state, params)
        candidates = budgets(np.asarray(moves, np.float64))
        values = fitness(candidates)
        state, _ = strategy.tell(tell, moves, jnp.asarray(values, jnp.float32), state, params)
        i = int(np.argmin(values))
        if values[i] < least:
            least, best = float(values[i]), candidates[i]
        curve.append(least)
    evaluations = 1 + settings.population * settings.generations
    return best, {"uniform": uniform, "best": curve, "evaluations": evaluations}
