"""Ways to spread a budget: each is one file with a function from a `BudgetProblem` to an `Allocation`, listed here."""

from __future__ import annotations

from wisparse_jax.errors import WisparseError
from wisparse_jax.search.allocators.evolution import evolution, evolution_of_equal_layers
from wisparse_jax.search.allocators.greedy import greedy
from wisparse_jax.search.allocators.paper import paper
from wisparse_jax.search.allocators.second_order import second_order
from wisparse_jax.search.allocators.uniform import uniform
from wisparse_jax.search.problem import Allocator

ALLOCATORS: dict[str, Allocator] = {
    "uniform": uniform,
    "greedy": greedy,
    "evolution": evolution,
    "evolution-equal-layers": evolution_of_equal_layers,
    "paper": paper,
    "second-order": second_order,
}


def get_allocator(name: str) -> Allocator:
    """The allocator of that name.

    Raises:
        WisparseError: no such allocator.
    """
    if name not in ALLOCATORS:
        raise WisparseError(f"allocator = {name!r}: expected one of {', '.join(ALLOCATORS)}")
    return ALLOCATORS[name]
