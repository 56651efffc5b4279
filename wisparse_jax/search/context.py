"""What the stages of one search work with: the model, the windows, the judge, and what is counted and kept."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Float64, Int

from wisparse_jax.calibration.dense import Calibration
from wisparse_jax.calibration.settings import TextSettings
from wisparse_jax.models.model import Model
from wisparse_jax.search.draft import Draft
from wisparse_jax.search.judge import Judge, sparse_at
from wisparse_jax.search.problem import BudgetProblem, Table
from wisparse_jax.search.progress import Progress
from wisparse_jax.search.state import Arrays, SearchState, Spent

WindowKL = Float64[np.ndarray, " windows"]  # held-out windows' KL


class Context:
    """What does not change from stage to stage."""

    def __init__(
        self,
        model: Model,
        windows: Int[np.ndarray, "windows length"],
        judge: Judge,
        seed: int,
        settings: TextSettings,
        text: str,
        progress: Progress,
        state: SearchState,
    ):
        self.model, self.windows, self.judge, self.seed, self.settings = model, windows, judge, seed, settings
        self.text, self.progress, self.state, self.spent = text, progress, state, Spent()
        self._problem: BudgetProblem | None = None

    def stage(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Time the body under a name of the time table."""
        return self.progress.stage(name)

    def steps(self, numbers: Iterable[int]) -> Iterator[int]:
        """The numbers, each moving the bar on by its part of the stage."""
        return self.progress.steps(numbers)

    def keep(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """What a former run has kept under a name, or what `make` finds, with the tokens that it spends."""
        return self.state.keep(name, make, self.spent)

    def problem(self, calibration: Calibration, exponents: Table, target: float) -> BudgetProblem:
        """The problem of a target; what was computed for another one is shared where run and exponents are the same."""
        last = self._problem
        if last is None or last.calibration is not calibration or not np.array_equal(last.exponents, exponents):
            # Not this object's own `steps`: the problem would hold what holds it, until garbage is collected.
            last = self._problem = BudgetProblem(
                calibration, exponents, self.settings, self.seed, self.progress.steps, self.spent, self.state
            )
        return last.aim(target)

    def better(self, name: str, old: Draft, new: Draft) -> Draft:
        """The new draft if its exponents and sparsities lose less on the held-out windows, or too few of these say so.

        If they do not, the old one, which keeps the record of the new.
        """
        same = np.array_equal(old.exponents, new.exponents) and np.array_equal(old.sparsities, new.sparsities)
        if not self.judge or same:
            return new
        with self.stage("held out"):
            before, after = self.held_out_kl(old), self.held_out_kl(new)
        new = new.recorded(f"{name} {new.target:g}, held-out KL", [float(before.mean()), float(after.mean())])
        return self._decided(f"{name} at {new.target:g}", old, new, before, after)

    def better_for_all(
        self, name: str, old: Draft, new: Draft, exponent: float = 0.0, planes: str | None = None
    ) -> Draft:
        """The same of what serves every target: judged by uniform sparsity, scored with an exponent where it is new, or
        by planes of which each layer reads the same share of the bits."""
        if new.held_out is None or old.held_out is None:
            return new
        with self.stage("held out"):
            before = self.judge.uniform_kl(old.held_out, 0.0, planes, old.held_out_runs)
            after = self.judge.uniform_kl(new.held_out, exponent, planes, new.held_out_runs)
        new = new.recorded(f"{name}, held-out KL", [float(before.mean()), float(after.mean())])
        return self._decided(name, old, new, before, after)

    def held_out_kl(self, draft: Draft) -> WindowKL:
        """Of each window, at just its sparsities: the thresholds are those of the held-out windows, not of the plan."""
        assert draft.held_out is not None
        sparse = sparse_at(draft.held_out, draft.exponents, draft.sparsities)
        return self.judge.window_kl(sparse, draft.held_out_runs)

    def _decided(self, name: str, old: Draft, new: Draft, before: WindowKL, after: WindowKL) -> Draft:
        kept, why = self.judge.verdict(before, after)
        chosen = new if kept else dataclasses.replace(old, history=new.history)
        return chosen.noted(f"{name}: {why}") if why else chosen
