"""Gains of the score and biases, trained on KL to the dense model by `search.training`."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from wisparse_jax.calibration.dense import Calibration
from wisparse_jax.calibration.settings import Settings, setting, switch
from wisparse_jax.models.config import LAYERS
from wisparse_jax.search.context import Context
from wisparse_jax.search.draft import Draft
from wisparse_jax.search.stages.base import BACKWARD, Part, Size, Stage
from wisparse_jax.search.stages.score import ScoreSettings
from wisparse_jax.search.state import Arrays
from wisparse_jax.search.training import Trained, start_of, train


@dataclasses.dataclass(frozen=True)
class TrainingSettings(ScoreSettings):
    """Settings of the training."""

    biases: str = switch("on", "off")
    training_steps: int = setting(300, largest=10**6, zero=True)
    training_tokens: int = setting(2_048)  # sparse positions of a step
    training_every: int = setting(25, largest=10**6)
    gain_rate: float = setting(0.005, largest=1)
    bias_rate: float = setting(0.0005, largest=1)


@dataclasses.dataclass(frozen=True)
class Training(Stage):
    """What lowers the KL of held-out windows; without these, nothing would say when to stop, and it is left out."""

    rows = ("training",)
    switches = ("gains", "biases")
    rough = False
    gains: bool = False
    biases: bool = False
    settings: TrainingSettings = dataclasses.field(default_factory=TrainingSettings)

    @property
    def switched(self) -> dict[str, str]:
        """The biases; of the gains, the score says more."""
        return {"biases": "on" if self.biases else "off"}

    def configured(self, settings: Settings) -> Training:
        """The stage that trains what the settings name, if anything."""
        training = TrainingSettings.of(settings)
        gains = self.gains if training.gains == "method" else training.gains == "trained"
        return Training(gains, self.biases if training.biases == "method" else training.biases == "on", training)

    def parts(self, size: Size) -> list[Part]:
        """All steps, and looks at the held-out windows."""
        if not size.held_out or not (self.gains or self.biases):
            return []
        own = self.settings
        looks = own.training_steps / own.training_every * size.held_out
        return [
            Part("training", BACKWARD * own.training_steps * own.training_tokens + looks, kind="training", programs=3)
        ]

    def run(self, search: Context, draft: Draft) -> Draft:
        """The draft with what was trained, if that helps."""
        held_out = draft.held_out
        if held_out is None or not (self.gains or self.biases) or not self.settings.training_steps or not draft.target:
            return draft
        with search.stage("training"):
            arrays = search.keep(f"training {draft.target:g}", lambda: self._find(search, draft, held_out))
        blocks = range(draft.calibration.config.num_blocks)
        trained = Trained(
            *([{name: jnp.asarray(arrays[f"{part} {b}.{name}"]) for name in LAYERS} for b in blocks]
              for part in Trained._fields)
        )  # fmt: skip
        looks = arrays["curve"]
        curve = looks.mean(axis=1)
        draft = draft.recorded(f"training {draft.target:g}, held-out KL", curve.tolist())
        if (least := int(curve.argmin())) == 0:
            return draft.noted(f"training at {draft.target:g}: dropped, held-out KL {curve[0]:.4f} was the least")
        kept, why = search.judge.verdict(looks[0], looks[least])
        draft = draft.noted(f"training at {draft.target:g}: {why}") if why else draft
        if not kept:
            return draft
        draft = dataclasses.replace(draft, biases=trained.biases if self.biases else None)
        if not self.gains:
            return draft
        gains = [{name: jnp.exp(row[name]) for name in LAYERS} for row in trained.log_gains]
        return dataclasses.replace(
            draft,
            calibration=draft.calibration.with_gains(gains),
            held_out=held_out.with_gains(gains),
            exponents=np.ones_like(draft.exponents),
            own_gains=True,
        )

    def _find(self, search: Context, draft: Draft, held_out: Calibration) -> Arrays:
        own, calibration = self.settings, draft.calibration
        rates = own.gain_rate * self.gains, own.bias_rate * self.biases
        start = start_of(calibration, draft.exponents)
        made, curve = train(
            calibration, held_out, start, draft.sparsities, own.training_steps, own.training_tokens,
            own.training_every, rates, search.seed, search.steps,
        )  # fmt: skip
        steps = min(own.training_steps, (len(curve) - 1) * own.training_every)
        search.spent.tokens += BACKWARD * steps * min(calibration.tokens.size, own.training_tokens)
        named = {
            f"{part} {b}.{name}": np.asarray(row[name])
            for part, rows in made._asdict().items() for b, row in enumerate(rows) for name in LAYERS
        }  # fmt: skip
        return named | {"curve": curve}
