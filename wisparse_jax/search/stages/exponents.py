"""The search of exponents (WiSparse, arXiv 2602.14452, Alg. 2): at uniform sparsity, and again at the final budgets."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from wisparse_jax.calibration.settings import Settings, setting
from wisparse_jax.models.config import LAYERS
from wisparse_jax.search.context import Context
from wisparse_jax.search.draft import Draft
from wisparse_jax.search.exponents import search_exponents
from wisparse_jax.search.losses import BlockLoss, LossSettings
from wisparse_jax.search.stages.base import Part, Size, Stage
from wisparse_jax.search.state import Arrays


@dataclasses.dataclass(frozen=True)
class ExponentSettings(LossSettings):
    """Settings of the search of exponents."""

    search_exponents: bool = setting(True)
    exponent_step: float = setting(0.05, least=1e-3)
    max_exponent: float = setting(1.5, largest=16)
    exponent_passes: int = setting(3, largest=10**5)
    exponent_tokens: int = setting(2_048)  # sparse positions on which block errors are measured

    @property
    def exponents(self) -> tuple[float, ...]:
        """The candidate exponents, 0 to `max_exponent`."""
        count = int(self.max_exponent / self.exponent_step + 1e-9)
        return tuple(round(i * self.exponent_step, 6) for i in range(count + 1))


@dataclasses.dataclass(frozen=True)
class Exponents(Stage):
    """Every layer's exponent by the error of its block, at uniform sparsity."""

    rows = ("exponents",)
    rough = False
    again: ClassVar[bool] = False  # after the budgets
    settings: ExponentSettings = dataclasses.field(default_factory=ExponentSettings)

    @property
    def searches_exponents(self) -> bool:
        """Whether targets have exponents of their own: unless the search is switched off."""
        return self.settings.search_exponents

    @property
    def switched(self) -> dict[str, str]:
        """Whether exponents are searched, "on" or "off"."""
        return {"search_exponents": "on" if self.settings.search_exponents else "off"}

    def configured(self, settings: Settings) -> Exponents:
        """The stage with its part of the settings."""
        return dataclasses.replace(self, settings=ExponentSettings.of(settings))

    def parts(self, size: Size) -> list[Part]:
        """All candidates in all passes."""
        own = self.settings
        if not own.search_exponents:
            return []
        tries = len(LAYERS) * len(own.exponents) * own.exponent_passes
        return [Part(self.rows[0], tries * own.exponent_tokens, kind="losses"), *size.judged()]

    def run(self, search: Context, draft: Draft) -> Draft:
        """The draft with the exponents, if they help."""
        name = self.rows[0]
        # At uniform sparsity the first search has found them.
        needless = self.again and (draft.sparsities == draft.target).all()
        if not self.settings.search_exponents or draft.target == 0 or needless:
            return draft
        key, found = f"{name} {draft.target}", []
        with search.stage(name):
            for b in search.steps(range(len(draft.exponents))):
                found.append(search.state.keep(f"{key} block {b}", lambda b=b: self._find(draft, b)))
        errors = [row["errors"].tolist() for row in found]
        searched = dataclasses.replace(draft, exponents=np.stack([row["exponents"] for row in found]))
        return search.better(name, draft, searched.recorded(key, {"block_error_before_and_after": errors}))

    def _find(self, draft: Draft, b: int) -> Arrays:
        own, calibration = self.settings, draft.calibration
        loss = BlockLoss(calibration, b, own.exponent_tokens, own.chunk)
        best, curve = search_exponents(
            loss, calibration.statistics[b], draft.exponents[b], draft.sparsities[b], own.exponents, own.exponent_passes
        )
        return {"exponents": best, "errors": np.asarray([curve[0], curve[-1]])}


@dataclasses.dataclass(frozen=True)
class FinalExponents(Exponents):
    """The same at the budgets that were found, from the exponents that these were found with."""

    rows = ("final exponents",)
    again = True
