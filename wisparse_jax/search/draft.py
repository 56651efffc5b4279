"""What a search knows of a plan so far, as one value: each stage takes a draft and gives the next."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from wisparse_jax.calibration.dense import Calibration
from wisparse_jax.calibration.sparse_run import Biases, ScoreThresholds
from wisparse_jax.search.problem import BudgetProblem, Table
from wisparse_jax.sparsity.planes import PlaneCurves


@dataclasses.dataclass(frozen=True, eq=False)
class Draft:
    """A plan under way; tables are by block and layer.

    What targets share is a draft without a target: each goes on from it, so that no target's record holds another's.
    """

    calibration: Calibration  # the dense run on the windows to search on, in the basis and with the gains so far
    held_out: Calibration | None  # the same on the windows that are held out, if there are any
    plain: BudgetProblem  # of the model as it is, by magnitudes: what a plan is compared with is searched for on it
    plain_held_out: Calibration | None
    exponents: Table
    sparsities: Table
    target: float = 0.0
    own_gains: bool = False  # the score's gains are the plan's own, not the norms of the weights that it runs with
    biases: Biases | None = None
    thresholds: ScoreThresholds | None = None
    planes: PlaneCurves | None = None  # of weights in planes: then sparsities are shares of their bits
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)  # on the windows that are held out
    history: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def held_out_runs(self) -> tuple[Calibration | None, ...]:
        """The dense runs on the windows that are held out: of the model as it is, and as the draft has it."""
        return self.plain_held_out, self.held_out

    def at(self, target: float) -> Draft:
        """The same with a target, uniform so far."""
        return dataclasses.replace(self, target=target, sparsities=np.full(self.exponents.shape, float(target)))

    def recorded(self, name: str, record: Any) -> Draft:
        """The same with more in its record."""
        return dataclasses.replace(self, history=self.history | {name: record})

    def noted(self, line: str) -> Draft:
        """The same with a note for the user."""
        return self.recorded("notes", [*self.history.get("notes", []), line])
