"""TEAL's budgets (arXiv 2408.14690, Alg. 1): blocks alike, layers inside a block greedily by the block's error."""

from __future__ import annotations

import numpy as np

from wisparse_jax.search.allocators.registry import allocator
from wisparse_jax.search.problem import Allocation, BudgetProblem


@allocator("greedy", asks=("paths",))
def greedy(problem: BudgetProblem) -> Allocation:
    """The point of every block's greedy path where the target is met."""
    return Allocation(problem.on_paths(np.full((1, problem.blocks), problem.target))[0], {})
