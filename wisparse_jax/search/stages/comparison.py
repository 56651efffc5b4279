"""What a finished plan loses on held-out windows, beside simpler ones and the dense model."""

from __future__ import annotations

import dataclasses

from wisparse_jax.calibration.settings import Settings
from wisparse_jax.models.model import Model
from wisparse_jax.search.context import Context
from wisparse_jax.search.draft import Draft
from wisparse_jax.search.judge import ComparisonSettings, baselines, in_planes
from wisparse_jax.search.problem import BudgetSettings, path_tokens
from wisparse_jax.search.stages.base import HELD_OUT, Part, Size, Stage
from wisparse_jax.sparsity.apply import threshold_rules, with_biases


@dataclasses.dataclass(frozen=True)
class Comparison(Stage):
    """Held-out figures of the plan, of uniform sparsity and, if the settings say so, of TEAL."""

    rows = (HELD_OUT, "comparison")
    rough = False
    settings: ComparisonSettings = dataclasses.field(default_factory=ComparisonSettings)
    budgets: BudgetSettings = dataclasses.field(default_factory=BudgetSettings)

    def configured(self, settings: Settings) -> Comparison:
        """The stage with its part of the settings."""
        return Comparison(ComparisonSettings.of(settings), BudgetSettings.of(settings))

    def parts(self, size: Size) -> list[Part]:
        """The runs on held-out windows, and TEAL's paths where the plan's own budgets have not asked for them."""
        teal = self.settings.compare_teal
        known = not size.exponents_vary and any("paths" in stage.asks for stage in size.stages)
        runs = (2 + teal) * size.held_out
        paths = path_tokens(size.config, self.budgets) if teal and not known and size.held_out else 0.0
        return [Part("comparison", runs, paths, "losses" if paths else "forward")]

    def run(self, search: Context, draft: Draft) -> Draft:
        """The draft with its figures."""
        with search.stage("comparison"):
            if not search.judge:
                return draft
            others = baselines(draft.plain, draft.plain_held_out, draft.target)
            figures = search.judge.report(_sparse(draft), others, draft.held_out_runs)
        return dataclasses.replace(draft, figures=figures)


def _sparse(draft: Draft) -> Model:
    """The model with the plan that the draft has become."""
    assert draft.thresholds is not None
    calibration = draft.calibration
    if draft.planes is not None:
        return in_planes(draft.planes, calibration, draft.target)
    rules = threshold_rules(calibration.gains, draft.exponents, draft.thresholds.values)
    if draft.biases is not None:
        rules = with_biases(rules, draft.biases)
    return Model(calibration.config, calibration.params, rules)
