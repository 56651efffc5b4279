"""Ways to spread a budget: a file each, with a function from a `BudgetProblem` to an `Allocation`, registered there."""

from wisparse_jax.search.allocators.registry import ALLOCATORS as ALLOCATORS
from wisparse_jax.search.allocators.registry import Allocator as Allocator
from wisparse_jax.search.allocators.registry import allocator as allocator
from wisparse_jax.search.allocators.registry import get_allocator as get_allocator

# In the order of messages and tables.
# isort: off
from wisparse_jax.search.allocators.uniform import uniform as uniform
from wisparse_jax.search.allocators.greedy import greedy as greedy
from wisparse_jax.search.allocators.evolution import evolution as evolution
from wisparse_jax.search.allocators.paper import paper as paper
from wisparse_jax.search.allocators.second_order import second_order as second_order
# isort: on
