"""Weights in planes: what each plane of each layer is worth, and the budget of bits."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from kernels_pallas.formats import FORMATS
from wisparse_jax.calibration.planes import plane_curves
from wisparse_jax.calibration.settings import GradientSettings, Settings
from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.formats import is_rounded
from wisparse_jax.models.model import Model
from wisparse_jax.models.quantise import quantise_params
from wisparse_jax.search.context import Context
from wisparse_jax.search.draft import Draft
from wisparse_jax.search.stages.base import BACKWARD, Part, Size, Stage
from wisparse_jax.search.state import Arrays
from wisparse_jax.sparsity.planes import LEVELS, PlaneCurves


@dataclasses.dataclass(frozen=True)
class Planes(Stage):
    """The curves of every plane of every layer, which serve every number of bits."""

    rows = ("planes",)
    shared = True
    format: str = "int2+2+2+2"
    magnitudes: bool = False  # the score is |x_i| and each plane has one share for all layers, as in GRINQH
    settings: GradientSettings = dataclasses.field(default_factory=GradientSettings)

    def configured(self, settings: Settings) -> Planes:
        """The stage with its part of the settings."""
        return dataclasses.replace(self, settings=GradientSettings.of(settings))

    def check(self, model: Model, method: str) -> None:
        """Refuse a model whose weights are rounded already."""
        if is_rounded(model.params):
            raise WisparseError(f"{method} rounds the weights to planes: expected the model as it was before rounding")

    def parts(self, size: Size) -> list[Part]:
        """Two walks of the gradients, through every plane."""
        # Of a backward pass a third is the products that there is one of for each plane.
        walks = BACKWARD * (2 + len(FORMATS[self.format].planes)) / 3
        return [Part("planes", 2 * walks * self.settings.gradient_tokens, kind="gradients")]

    def run(self, search: Context, draft: Draft) -> Draft:
        """The draft with the curves."""
        with search.stage("planes"):
            arrays = search.keep("planes", lambda: self._find(search, draft))
        blocks = range(draft.calibration.config.num_blocks)
        gains = [{name: jnp.asarray(arrays[f"{b}.{name}"]) for name in LAYERS} for b in blocks]
        levels = LEVELS.astype(np.float32).astype(np.float64)
        curves = PlaneCurves(self.format, levels, arrays["thresholds"], arrays["costs"], gains)
        return dataclasses.replace(draft, planes=curves, exponents=np.ones(draft.exponents.shape))

    def _find(self, search: Context, draft: Draft) -> Arrays:
        calibration, tokens = draft.calibration, self.settings.gradient_tokens
        planes = quantise_params(calibration.params, self.format)["blocks"]
        curves = plane_curves(calibration, self.format, planes, tokens, search.seed, self.magnitudes)
        search.spent.tokens += 2 * BACKWARD * tokens
        gains = {f"{b}.{name}": np.asarray(row[name]) for b, row in enumerate(curves.gains) for name in LAYERS}
        return {"thresholds": curves.thresholds, "costs": curves.costs} | gains


@dataclasses.dataclass(frozen=True)
class PlaneBudgets(Stage):
    """The budget of least predicted KL: arithmetic on the curves."""

    rows = ("budgets",)

    def run(self, search: Context, draft: Draft) -> Draft:
        """The draft with the share of each layer's bits that is not read."""
        assert draft.planes is not None
        with search.stage("budgets"):
            skipped = draft.planes.skipped(draft.calibration.config.layer_weights, draft.target)
        made = dataclasses.replace(draft, sparsities=draft.planes.layer_shares(skipped))
        return made.recorded(f"budgets {draft.target:g}", {"predicted": draft.planes.predicted(skipped)})
