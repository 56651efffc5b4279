"""Budgets over all layers of the model at once, from their second-order costs.

Costs add up over layers, so the best budget takes steps of sparsity by what they cost per weight: `cheapest`.
"""

from __future__ import annotations

from wisparse_jax.search.allocators.registry import allocator
from wisparse_jax.search.problem import Allocation, BudgetProblem
from wisparse_jax.sparsity.budget import cheapest


@allocator("second-order", starts_from="uniform", asks=("costs",))
def second_order(problem: BudgetProblem) -> Allocation:
    """The budget of least predicted KL."""
    sparsities = problem.table(cheapest(problem.curves, problem.levels, problem.shares, problem.target))
    return Allocation(sparsities, {"predicted": problem.predicted(sparsities)})
