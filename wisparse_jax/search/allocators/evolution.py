"""Block budgets by an evolution strategy on the model's KL (WiSparse, Alg. 3, repaired).

The paper's own evolution moves single blocks by 0.005, less than the roughness of the loss, forgets its parent, and
evaluates blocks whose layers all have one sparsity, which is not how they end. Here a distribution over all blocks at
once (evosax) keeps its best candidate, and every candidate is evaluated with the layer budgets that it would get.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float64

from wisparse_jax.calibration.settings import Settings, setting
from wisparse_jax.search.allocators.registry import allocator
from wisparse_jax.search.problem import Allocation, BudgetProblem, BudgetSettings

ALGORITHMS = ("CR_FM_NES", "SNES")  # of evosax, which has more: a name is all that another one takes


@dataclasses.dataclass(frozen=True)
class EvolutionSettings(Settings):
    """Settings of the evolution of block budgets (Alg. 3)."""

    algorithm: str = setting("CR_FM_NES", choices=lambda: ALGORITHMS)
    population: int = setting(
        32, largest=2**14, expected=("an even number, at least 4", lambda count: count % 2 == 0 and count >= 4)
    )
    generations: int = setting(60, largest=10**5)
    initial_std: float = setting(0.05, share=True)  # of the candidates' sparsities around uniform


def _tokens(settings: Settings) -> float:
    evolved = EvolutionSettings.of(settings)
    return float(evolved.population * (evolved.generations + 1) * BudgetSettings.of(settings).block_tokens)


@allocator("evolution", starts_from="greedy", asks=("paths",), tokens=_tokens)
def evolution(problem: BudgetProblem) -> Allocation:
    """Block budgets evolved, each candidate with the layers of its blocks' greedy paths; TEAL's budget is one."""
    budget, history = evolve(problem)
    return Allocation(problem.on_paths(budget[None])[0], history)


def evolve(problem: BudgetProblem) -> tuple[Float64[np.ndarray, " blocks"], dict[str, Any]]:
    """The block sparsities of least KL found, their mean the target.

    Every candidate is moved onto the budget, and evaluated with the layers of its blocks' greedy paths; the uniform one
    is a candidate, so the result is never worse than it on the tokens of the search.

    Returns:
        The best budget, and the history: the KL of uniform budgets, the best of each generation, and the evaluations.
    """
    import jax
    import jax.numpy as jnp

    from wisparse_jax.models.keys import random_key

    settings, blocks = EvolutionSettings.of(problem.settings), problem.blocks
    best, zero = np.full(blocks, problem.target), jnp.zeros(blocks, jnp.float32)
    if blocks == 1:
        return best, {"uniform": None, "best": [], "evaluations": 0}
    strategy = _strategy(settings.algorithm, settings.population, blocks)
    key, start = jax.random.split(random_key(problem.seed))
    with _promotion():
        params = strategy.default_params.replace(std_init=settings.initial_std)
        # Types as `tell` returns them, or its next call is compiled anew.
        state = jax.tree.map(lambda a: jnp.asarray(a, a.dtype), strategy.init(start, zero, params))
    least = uniform = float(problem.kl(problem.on_paths(np.tile(best, (settings.population, 1))))[0])
    curve: list[float] = []
    for _ in problem.progress(range(settings.generations)):
        key, ask, tell = jax.random.split(key, 3)
        with _promotion():
            moves, state = strategy.ask(ask, state, params)
        candidates = problem.within_budget(problem.target + np.asarray(moves, np.float64))
        values = problem.kl(problem.on_paths(candidates))
        # A strategy ranks or sums what it is told: infinity would spoil its sums.
        told = np.where(np.isfinite(values), values, 10 * values[np.isfinite(values)].max())
        with _promotion():
            state, _ = strategy.tell(tell, moves, jnp.asarray(told, jnp.float32), state, params)
        i = int(np.argmin(values))
        if values[i] < least:
            least, best = float(values[i]), candidates[i]
        curve.append(least)
    evaluations = settings.population * (settings.generations + 1)
    return best, {"uniform": uniform, "best": curve, "evaluations": evaluations}


@functools.lru_cache(maxsize=8)
def _strategy(algorithm: str, population: int, blocks: int) -> Any:
    """The same object for every search alike, since evosax compiles for each object."""
    import evosax.algorithms
    import jax.numpy as jnp

    return getattr(evosax.algorithms, algorithm)(population, jnp.zeros(blocks, jnp.float32))


@contextlib.contextmanager
def _promotion() -> Iterator[None]:
    """For evosax, which multiplies truths, and vectors with matrices: a user may forbid both."""
    import jax

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
