"""The dense run, which every search begins with."""

from __future__ import annotations

import dataclasses

import numpy as np

from wisparse_jax.calibration.dense import run_dense
from wisparse_jax.models.config import LAYERS
from wisparse_jax.search.context import Context
from wisparse_jax.search.draft import Draft
from wisparse_jax.search.problem import BudgetProblem
from wisparse_jax.search.stages.base import HELD_OUT, Part, Size, Stage

FEW_TOKENS = 2_048  # below it a search is warned about


@dataclasses.dataclass(frozen=True)
class DenseRun(Stage):
    """Inputs, caches and statistics of the model as it is, on the windows to search on and on those held out."""

    rows = ("statistics",)
    shared = True

    def parts(self, size: Size) -> list[Part]:
        """The tokens of every window, once."""
        return [Part("statistics", tokens=size.text), Part(HELD_OUT, size.held_out)]

    def begin(self, search: Context) -> Draft:
        """Run the dense model, and give the draft that the search begins with."""
        with search.stage("statistics"):
            calibration = run_dense(search.model, search.windows, search.settings, search.seed, search.text)
        with search.stage(HELD_OUT):
            held_out = search.judge.run_dense(calibration)
        zero = np.zeros((calibration.config.num_blocks, len(LAYERS)))
        plain = BudgetProblem(
            calibration, zero, search.settings, search.seed, search.progress.steps, state=search.state
        )
        draft = Draft(calibration, held_out, plain, held_out, zero, zero)
        if (positions := calibration.tokens.size) < FEW_TOKENS:
            draft = draft.noted(f"a search on {positions} sparse positions may over-fit them")
        return draft

    def run(self, search: Context, draft: Draft) -> Draft:
        """Nothing: a search begins with `begin`."""
        return draft
