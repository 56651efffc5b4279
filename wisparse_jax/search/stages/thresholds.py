"""The thresholds, which every search ends with: set along the sparse model's own run."""

from __future__ import annotations

import dataclasses

from wisparse_jax.calibration.sparse_run import ScoreThresholds, sparse_thresholds
from wisparse_jax.search.context import Context
from wisparse_jax.search.draft import Draft
from wisparse_jax.search.stages.base import Part, Size, Stage


@dataclasses.dataclass(frozen=True)
class FinalThresholds(Stage):
    """The thresholds that realise the sparsities on all windows, held-out ones included."""

    rows = ("thresholds",)
    rough = False

    def parts(self, size: Size) -> list[Part]:
        """The tokens of every window, once."""
        return [Part("thresholds", tokens=size.text)]

    def run(self, search: Context, draft: Draft) -> Draft:
        """The draft with its thresholds."""
        if draft.planes is not None:  # the curves have them: along a run in planes they are the same, to 1 % of the KL
            with search.stage("thresholds"):
                skipped = draft.planes.skipped(draft.calibration.config.layer_weights, draft.target)
                first = draft.planes.thresholds_at(skipped)[:, :, 0]
            return dataclasses.replace(draft, thresholds=ScoreThresholds(first, draft.sparsities))
        with search.stage("thresholds"):
            thresholds = sparse_thresholds(
                draft.calibration, draft.exponents, draft.sparsities, draft.biases, draft.held_out
            )  # fmt: skip
        return dataclasses.replace(draft, thresholds=thresholds)
