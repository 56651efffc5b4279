"""The budgets of all layers, by an allocator."""

from __future__ import annotations

import dataclasses

import numpy as np

from wisparse_jax.calibration.settings import Settings, setting
from wisparse_jax.search.allocators import ALLOCATORS, Allocator, get_allocator
from wisparse_jax.search.context import Context
from wisparse_jax.search.draft import Draft
from wisparse_jax.search.problem import BudgetSettings, path_tokens
from wisparse_jax.search.stages.base import BACKWARD, Part, Size, Stage


@dataclasses.dataclass(frozen=True)
class AllocationSettings(BudgetSettings):
    """Settings of the budgets."""

    allocator: str = setting("method", choices=lambda: ("method", *ALLOCATORS))


@dataclasses.dataclass(frozen=True)
class Budgets(Stage):
    """What the allocator finds or, if that loses less on held-out windows, what it starts from."""

    rows = ("budgets",)
    switches = ("allocator",)
    allocator: Allocator = dataclasses.field(default_factory=lambda: get_allocator("uniform"))
    settings: Settings = dataclasses.field(default_factory=AllocationSettings)  # an allocator may have its own

    @property
    def asks(self) -> tuple[str, ...]:
        """The answers that the allocator needs."""
        return self.allocator.asks

    @property
    def switched(self) -> dict[str, str]:
        """The allocator's name."""
        return {"allocator": self.allocator.name}

    def configured(self, settings: Settings) -> Budgets:
        """The stage with the allocator that the settings name, if any."""
        name = AllocationSettings.of(settings).allocator
        return Budgets(self.allocator if name == "method" else get_allocator(name), settings)

    def parts(self, size: Size) -> list[Part]:
        """What the allocator asks, and a judgement if it starts from something."""
        settings = BudgetSettings.of(self.settings)
        prices = {"paths": path_tokens(size.config, settings), "costs": BACKWARD * settings.gradient_tokens}
        asked, each = float(sum(prices[name] for name in self.asks)), float(self.allocator.tokens(self.settings))
        kind = "gradients" if self.asks == ("costs",) and not each else "losses"
        once, each = (0.0, asked + each) if size.exponents_vary else (asked, each)
        return [Part("budgets", each, once, kind), *size.judged() * (self.allocator.starts_from is not None)]

    def run(self, search: Context, draft: Draft) -> Draft:
        """The draft with the budgets."""
        if draft.target == 0:
            return dataclasses.replace(draft, sparsities=np.zeros(draft.sparsities.shape))
        with search.stage("budgets"):
            problem = search.problem(draft.calibration, draft.exponents, draft.target)
            allocation = self.allocator(problem)
        draft = draft.recorded(f"budgets {draft.target:g}", allocation.history)
        budgeted = dataclasses.replace(draft, sparsities=allocation.sparsities)
        # What was found on the tokens of the search against what it started from, which for an evolution is TEAL's.
        if self.allocator.starts_from is None:
            return budgeted
        start = get_allocator(self.allocator.starts_from)(problem).sparsities
        return search.better("budgets", dataclasses.replace(draft, sparsities=start), budgeted)
