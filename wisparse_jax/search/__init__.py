"""How a plan is found: basis, exponents, budgets by allocators, biases; pipeline and state."""

from wisparse_jax.search.allocators import allocator as allocator
from wisparse_jax.search.methods import METHODS as METHODS
from wisparse_jax.search.methods import Method as Method
from wisparse_jax.search.pipeline import calibrate as calibrate
from wisparse_jax.search.pipeline import calibrate_targets as calibrate_targets
from wisparse_jax.search.pipeline import calibrate_to_kl as calibrate_to_kl
from wisparse_jax.search.pipeline import with_budgets as with_budgets
from wisparse_jax.search.problem import Allocation as Allocation
from wisparse_jax.search.problem import BudgetProblem as BudgetProblem
from wisparse_jax.search.settings import SearchSettings as SearchSettings
from wisparse_jax.search.settings import read_settings as read_settings
from wisparse_jax.search.stages import Stage as Stage
from wisparse_jax.search.state import remove_state as remove_state
