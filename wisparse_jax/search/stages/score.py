"""What counts a channel in the score: the norms of its weights, or the gradients with respect to it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from wisparse_jax.calibration.gradients import gradient_gains
from wisparse_jax.calibration.settings import GradientSettings, Settings, switch
from wisparse_jax.models.config import LAYERS
from wisparse_jax.search.context import Context
from wisparse_jax.search.draft import Draft
from wisparse_jax.search.stages.base import BACKWARD, Part, Size, Stage
from wisparse_jax.search.state import Arrays
from wisparse_jax.sparsity.score import ChannelGains

GAINS = ("norms", "gradients", "trained")


@dataclasses.dataclass(frozen=True)
class ScoreSettings(GradientSettings):
    """Settings of the score."""

    gains: str = switch(*GAINS)


@dataclasses.dataclass(frozen=True)
class Score(Stage):
    """The gains of the score and every layer's exponent, or where the search of exponents starts.

    Trained gains start from gradients, which stay only if uniform sparsity loses less with them.
    """

    rows = ("gains",)
    switches = ("gains",)
    shared = True
    gains: str = "norms"
    exponent: float = 0.0
    start: bool = False  # the exponent is where a search starts
    settings: ScoreSettings = dataclasses.field(default_factory=ScoreSettings)

    @property
    def switched(self) -> dict[str, str]:
        """The kind of gains."""
        return {"gains": self.gains}

    def configured(self, settings: Settings) -> Score:
        """The stage with the gains that the settings name, if any."""
        score = ScoreSettings.of(settings)
        if score.gains == "method":
            return dataclasses.replace(self, settings=score)
        # At 0 gains count for nothing.
        exponent = self.exponent if score.gains == "norms" or self.start else 1.0
        return dataclasses.replace(self, gains=score.gains, exponent=exponent, settings=score)

    def parts(self, size: Size) -> list[Part]:
        """A walk of the gradients."""
        if self.gains == "norms":
            return []
        return [Part("gains", BACKWARD * self.settings.gradient_tokens, kind="gradients"), *size.judged()]

    def run(self, search: Context, draft: Draft) -> Draft:
        """The draft with the score."""
        scored = dataclasses.replace(draft, exponents=np.full(draft.exponents.shape, self.exponent))
        if self.gains == "norms":
            return scored
        with search.stage("gains"):
            arrays = search.keep("gains", lambda: self._find(search, draft))
        blocks = range(draft.calibration.config.num_blocks)
        gains: list[ChannelGains] = [{name: jnp.asarray(arrays[f"{b}.{name}"]) for name in LAYERS} for b in blocks]
        held_out = None if draft.held_out is None else draft.held_out.with_gains(gains)
        own_gains = dataclasses.replace(
            scored, calibration=draft.calibration.with_gains(gains), held_out=held_out, own_gains=True
        )
        return search.better_for_all("gains", draft, own_gains, exponent=1.0)

    def _find(self, search: Context, draft: Draft) -> Arrays:
        gains = gradient_gains(draft.calibration, self.settings.gradient_tokens, search.seed)
        search.spent.tokens += BACKWARD * self.settings.gradient_tokens
        return {f"{b}.{name}": np.asarray(row[name]) for b, row in enumerate(gains) for name in LAYERS}
