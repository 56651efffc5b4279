"""How a plan is found: statistics, objectives, exponents, block budgets, layer budgets, pipeline."""

from wisparse_jax.search.calibration import run_dense as run_dense
from wisparse_jax.search.pipeline import calibrate as calibrate
from wisparse_jax.search.pipeline import search_plan as search_plan
from wisparse_jax.search.settings import SearchSettings as SearchSettings
from wisparse_jax.search.settings import read_settings as read_settings
