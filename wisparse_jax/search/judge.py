"""The windows that are held out: what they say of a plan, and of what it is compared with.

No search is given them. They stop training, decide which stages are dropped, and help to set the thresholds, so that
their figures are a little in a plan's favour: other text is the test. A part stays if it lowers their KL by more than
chance would, see `search.verdict`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int32

from wisparse_jax.calibration.dense import Calibration, run_dense_on
from wisparse_jax.calibration.planes import uniform_planes
from wisparse_jax.calibration.settings import TextSettings, setting
from wisparse_jax.calibration.sparse_run import sparse_thresholds
from wisparse_jax.evaluation import DenseRun, Evaluation, evaluate
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.model import Model
from wisparse_jax.models.quantise import quantise_params
from wisparse_jax.search.allocators import get_allocator
from wisparse_jax.search.problem import BudgetProblem, Table
from wisparse_jax.search.verdict import Verdict, verdict
from wisparse_jax.sparsity.apply import threshold_rules
from wisparse_jax.sparsity.planes import PlaneCurves

Runs = Sequence[Calibration | None]
# Fewer windows than this leave none to hold out.
FEWEST_WINDOWS = 4
# Share of the stored bits that is not read where a basis for planes is judged: 3 bits of int2+2+2+2 are read.
UNREAD_BITS = 0.63


@dataclasses.dataclass(frozen=True)
class JudgeSettings(TextSettings):
    """Of what is judged at uniform sparsity."""

    # what a basis is refined for and judged at, whatever the target, so that targets share it
    basis_sparsity: float = setting(0.5, share=True)


@dataclasses.dataclass(frozen=True)
class ComparisonSettings(TextSettings):
    """Of what a plan is compared with."""

    # a plan's held-out figures stand beside TEAL's too, whose search then runs as well
    compare_teal: bool = setting(True)


def held_out_windows(count: int, settings: TextSettings) -> int:
    """How many of so many windows are held out: one at least, where there are enough, and never all."""
    if count < FEWEST_WINDOWS or settings.held_out_share == 0:
        return 0
    return min(count - 1, max(1, round(count * settings.held_out_share)))


class Judge:
    """Windows that are held out, each of a kind, and the dense model; without windows it judges nothing."""

    def __init__(
        self,
        model: Model,
        windows: Int32[np.ndarray, "windows length"],
        settings: JudgeSettings,
        seed: int,
        kinds: Sequence[str] = (),
    ):
        self.model, self.windows, self.settings, self.seed = model, windows, settings, seed
        self.kinds = tuple(kinds)

    def __bool__(self) -> bool:
        """Whether there are windows."""
        return len(self.windows) > 0

    def run_dense(self, calibration: Calibration) -> Calibration | None:
        """The dense run of a calibration's model on the windows."""
        return run_dense_on(calibration, self.windows, self.settings, self.seed) if self else None

    def evaluate(self, plans: dict[str, Model], runs: Runs) -> Evaluation:
        """The plans' scores on the windows, of which `runs` are dense runs."""
        known = [DenseRun(run.params, run.inputs[-1], run.caches) for run in runs if run is not None]
        return evaluate(self.model, self.windows, plans, self.settings.sparse_share, known=known)

    def kl(self, sparse: Model, runs: Runs) -> float:
        """KL(dense || sparse) on the windows, nats per token."""
        return float(self.window_kl(sparse, runs).mean())

    def window_kl(self, sparse: Model, runs: Runs) -> Float64[np.ndarray, " windows"]:
        """The same of each window."""
        return self.evaluate({"plan": sparse}, runs).sparse["plan"].window_kl

    def uniform_kl(
        self, held_out: Calibration, exponent: float, planes: str | None, runs: Runs
    ) -> Float64[np.ndarray, " windows"]:
        """The same of one share everywhere, of channels, or of the bits of planes; the windows' own scores set the
        thresholds."""
        if planes is not None:
            return self.window_kl(uniform_planes(held_out, planes, UNREAD_BITS), runs)
        shape = (held_out.config.num_blocks, len(LAYERS))
        exponents = np.full(shape, exponent)
        return self.window_kl(sparse_at(held_out, exponents, np.full(shape, self.settings.basis_sparsity)), runs)

    def verdict(self, before: Float64[np.ndarray, " windows"], after: Float64[np.ndarray, " windows"]) -> Verdict:
        """Whether a part is kept that changes the windows' KL."""
        return verdict(before, after, self.kinds)

    def report(self, sparse: Model, baselines: dict[str, Model], runs: Runs) -> dict[str, Any]:
        """Held-out KL, perplexity and realised sparsity of a plan and of others, and the dense model's perplexity."""
        if not self:
            return {}
        result = self.evaluate({"plan": sparse} | baselines, runs)
        out: dict[str, Any] = {"windows": len(self.windows), "dense_perplexity": result.dense.perplexity.mean}
        for name, score in result.sparse.items():
            figures = {"kl": score.kl, "perplexity": score.perplexity, "sparsity": score.sparsity}
            out[name] = {key: figure.mean for key, figure in figures.items()}
        return out


def sparse_at(calibration: Calibration, exponents: Table, sparsities: Table, more: Calibration | None = None) -> Model:
    """The model of a calibration at sparsities that its own text realises, with further windows or without."""
    found = sparse_thresholds(calibration, exponents, sparsities, more=more)
    rules = threshold_rules(calibration.gains, exponents, found.values)
    return Model(calibration.config, calibration.params, rules)


def in_planes(planes: PlaneCurves, calibration: Calibration, target: float) -> Model:
    """The model of a calibration in planes, of whose bits a share is not read."""
    config = calibration.config
    rules = planes.rules(config.layer_weights, target)
    return Model(config, quantise_params(calibration.params, planes.format), rules)


def baselines(teal: BudgetProblem, held_out: Calibration | None, target: float) -> dict[str, Model]:
    """Uniform sparsity and, if the settings say so, TEAL's, by magnitude in the basis that the model has.

    `teal` is the problem of the plain model at exponents of 0; `held_out` the plain model's run on the windows that are
    held out. Thresholds come from both, as a plan's do.
    """
    zero = teal.exponents
    budgets = {"uniform": np.full(zero.shape, float(target))}
    if ComparisonSettings.of(teal.settings).compare_teal and target > 0:
        budgets["teal"] = get_allocator("greedy")(teal.aim(target)).sparsities
    return {name: sparse_at(teal.calibration, zero, sparsities, held_out) for name, sparsities in budgets.items()}
