"""The windows that are held out: what they say of a plan, and of what it is compared with.

No search is given them. They stop training, decide which stages are dropped, and help to set the thresholds, so that
their figures are a little in a plan's favour: other text is the test.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int32

from wisparse_jax.calibration.dense import Calibration, run_dense_on
from wisparse_jax.calibration.settings import SearchSettings
from wisparse_jax.calibration.sparse_run import sparse_thresholds
from wisparse_jax.evaluation import Evaluation, evaluate
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.llama import Llama
from wisparse_jax.search.allocators import get_allocator
from wisparse_jax.search.problem import BudgetProblem, Table
from wisparse_jax.sparsity.apply import SparseLlama, threshold_rules

# Fewer windows than this leave none to hold out.
FEWEST_WINDOWS = 4


def held_out_windows(count: int, settings: SearchSettings) -> int:
    """How many of so many windows are held out: one at least, where there are enough, and never all."""
    if count < FEWEST_WINDOWS or settings.held_out_share == 0:
        return 0
    return min(count - 1, max(1, round(count * settings.held_out_share)))


class Judge:
    """Windows that are held out, and the dense model; without windows it judges nothing."""

    def __init__(self, model: Llama, windows: Int32[np.ndarray, "windows length"], settings: SearchSettings, seed: int):
        self.model, self.windows, self.settings, self.seed = model, windows, settings, seed

    def __bool__(self) -> bool:
        """Whether there are windows."""
        return len(self.windows) > 0

    def run_dense(self, calibration: Calibration) -> Calibration | None:
        """The dense run of a calibration's model on the windows."""
        return run_dense_on(calibration, self.windows, self.settings, self.seed) if self else None

    def evaluate(self, plans: dict[str, SparseLlama]) -> Evaluation:
        """The plans' scores on the windows."""
        return evaluate(self.model, self.windows, plans, self.settings.sparse_share)

    def divergence(self, sparse: SparseLlama) -> float:
        """KL(dense || sparse) on the windows, nats per token."""
        return self.evaluate({"plan": sparse}).sparse["plan"].divergence.mean

    def uniform_divergence(self, held_out: Calibration, exponent: float) -> float:
        """The same of uniform sparsity; the windows' own scores set the thresholds."""
        shape = (held_out.config.num_blocks, len(LAYERS))
        exponents = np.full(shape, exponent)
        sparse = sparse_at(held_out, exponents, np.full(shape, self.settings.basis_sparsity))
        return self.divergence(sparse)

    def report(self, sparse: SparseLlama, baselines: dict[str, SparseLlama]) -> dict[str, Any]:
        """Held-out KL, perplexity and realised sparsity of a plan and of others, and the dense model's perplexity."""
        if not self:
            return {}
        result = self.evaluate({"plan": sparse} | baselines)
        out: dict[str, Any] = {"windows": len(self.windows), "dense_perplexity": result.dense.perplexity.mean}
        for name, score in result.sparse.items():
            figures = {"kl": score.divergence, "perplexity": score.perplexity, "sparsity": score.sparsity}
            out[name] = {key: figure.mean for key, figure in figures.items()}
        return out


def sparse_at(
    calibration: Calibration, exponents: Table, sparsities: Table, more: Calibration | None = None
) -> SparseLlama:
    """The model of a calibration at sparsities that its own text realises, with further windows or without."""
    found = sparse_thresholds(calibration, exponents, sparsities, more=more)
    rules = threshold_rules(calibration.gains, exponents, found.taus)
    return SparseLlama(calibration.config, calibration.params, rules)


def baselines(teal: BudgetProblem, held_out: Calibration | None, target: float) -> dict[str, SparseLlama]:
    """Uniform sparsity and, if the settings say so, TEAL's, by magnitude in the basis that the model has.

    `teal` is the problem of the plain model at exponents of 0, which keeps its paths for other targets; `held_out` the
    plain model's run on the windows that are held out. Thresholds come from both, as a plan's do.
    """
    zero = teal.exponents
    budgets = {"uniform": np.full(zero.shape, float(target))}
    if teal.settings.compare_teal and target > 0:
        budgets["teal"] = get_allocator("greedy")(teal.aim(target)).sparsities
    return {name: sparse_at(teal.calibration, zero, sparsities, held_out) for name, sparsities in budgets.items()}
