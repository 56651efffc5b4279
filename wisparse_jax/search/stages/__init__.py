"""The stages of a search, one file each: its settings, what it takes, and what it does to a draft of a plan."""

from wisparse_jax.search.stages.base import Part as Part
from wisparse_jax.search.stages.base import Size as Size
from wisparse_jax.search.stages.base import Stage as Stage
from wisparse_jax.search.stages.basis import Basis as Basis
from wisparse_jax.search.stages.budgets import Budgets as Budgets
from wisparse_jax.search.stages.comparison import Comparison as Comparison
from wisparse_jax.search.stages.dense import DenseRun as DenseRun
from wisparse_jax.search.stages.exponents import Exponents as Exponents
from wisparse_jax.search.stages.exponents import FinalExponents as FinalExponents
from wisparse_jax.search.stages.planes import PlaneBudgets as PlaneBudgets
from wisparse_jax.search.stages.planes import Planes as Planes
from wisparse_jax.search.stages.score import Score as Score
from wisparse_jax.search.stages.thresholds import FinalThresholds as FinalThresholds
from wisparse_jax.search.stages.training import Training as Training

# In the order in which they run.
STAGES: tuple[type[Stage], ...] = (
    DenseRun, Basis, Planes, PlaneBudgets, Score, Exponents, Budgets, FinalExponents, Training, FinalThresholds,
    Comparison,
)  # fmt: skip
