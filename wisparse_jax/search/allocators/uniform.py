"""The same sparsity everywhere."""

from __future__ import annotations

from wisparse_jax.search.allocators.registry import allocator
from wisparse_jax.search.problem import Allocation, BudgetProblem


@allocator("uniform")
def uniform(problem: BudgetProblem) -> Allocation:
    """The target in every layer."""
    return Allocation(problem.uniform(), {})
