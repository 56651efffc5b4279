"""How a plan is found: basis, exponents, budgets by allocators, biases; pipeline and state."""

from wisparse_jax.search.pipeline import calibrate as calibrate
from wisparse_jax.search.pipeline import calibrate_targets as calibrate_targets
from wisparse_jax.search.pipeline import calibrate_to_divergence as calibrate_to_divergence
from wisparse_jax.search.pipeline import with_budgets as with_budgets
from wisparse_jax.search.problem import BudgetProblem as BudgetProblem
from wisparse_jax.search.state import remove_state as remove_state
