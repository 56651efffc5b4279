"""Block budgets to the letter of the paper (WiSparse, arXiv 2602.14452, Alg. 3), then its layer budgets (Alg. 4).

From uniform; in each of 400 generations 64 offspring: a tenth of the blocks get 0.005 more, then random blocks get
0.005 less until the mean is back; the best offspring becomes the parent, which does not compete itself. All layers of a
block have one sparsity meanwhile. Sparsities are whole numbers of units, so that the mean is met exactly.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float64

from wisparse_jax.calibration.settings import Settings, setting
from wisparse_jax.models.config import LAYERS
from wisparse_jax.search.allocators.registry import allocator
from wisparse_jax.search.problem import Allocation, BudgetProblem, BudgetSettings

UNIT = 0.005


@dataclasses.dataclass(frozen=True)
class PaperSettings(Settings):
    """Settings of the paper's evolution."""

    paper_generations: int = setting(400, largest=10**5)
    paper_offspring: int = setting(64, largest=2**14)


def _tokens(settings: Settings) -> float:
    evolved = PaperSettings.of(settings)
    return float(evolved.paper_offspring * evolved.paper_generations * BudgetSettings.of(settings).block_tokens)


@allocator("paper", asks=("paths",), tokens=_tokens)
def paper(problem: BudgetProblem) -> Allocation:
    """The parent of the last generation, with the layers of the greedy paths."""
    settings, blocks = PaperSettings.of(problem.settings), problem.blocks
    rng = np.random.default_rng(problem.seed)
    highest = int(problem.max_sparsity / UNIT + 1e-9)
    units = _as_units(problem.target, blocks, highest)
    moved, curve = max(1, int(0.1 * blocks)), []
    for _ in problem.progress(range(settings.paper_generations)):
        offspring = np.stack([_mutated(units, moved, highest, rng) for _ in range(settings.paper_offspring)])
        values = problem.kl(equal_layers(problem.within_budget(offspring * UNIT)))
        units = offspring[int(np.argmin(values))]
        curve.append(float(values.min()))
    budget = problem.within_budget(units[None] * UNIT)
    evaluations = settings.paper_generations * settings.paper_offspring
    return Allocation(problem.on_paths(budget)[0], {"best": curve, "evaluations": evaluations})


def equal_layers(
    budgets: Float64[np.ndarray, "candidates blocks"],
) -> Float64[np.ndarray, "candidates blocks 7"]:
    """The same sparsity for all layers of a block."""
    return np.repeat(budgets[:, :, None], len(LAYERS), axis=2)


def _as_units(target: float, blocks: int, highest: int) -> np.ndarray:
    """The uniform budget in units, their sum as close to the target's as whole numbers come."""
    total = round(target * blocks / UNIT)
    return np.minimum(total // blocks + (np.arange(blocks) < total % blocks), highest)


def _mutated(units: np.ndarray, moved: int, highest: int, rng: np.random.Generator) -> np.ndarray:
    child = units.copy()
    child[rng.choice(len(units), moved, replace=False)] += 1
    child = np.minimum(child, highest)
    while child.sum() > units.sum():
        child[rng.choice(np.flatnonzero(child > 0))] -= 1
    return child
