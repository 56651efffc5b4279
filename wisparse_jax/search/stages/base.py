"""What a stage of a search is."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

from wisparse_jax.calibration.settings import Settings
from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.model import Model
from wisparse_jax.search.context import Context
from wisparse_jax.search.draft import Draft
from wisparse_jax.search.forecast import Part as Part
from wisparse_jax.search.problem import BACKWARD as BACKWARD

HELD_OUT = "held out"


class Size(NamedTuple):
    """How much a search has to do."""

    config: LlamaConfig
    text: int  # tokens of all windows
    held_out: int  # tokens of the windows that are held out
    stages: tuple[Any, ...]  # of the search, from first to last

    @property
    def exponents_vary(self) -> bool:
        """Whether targets have exponents of their own, and share nothing that depends on these."""
        return any(stage.searches_exponents for stage in self.stages)

    def judged(self) -> list[Part]:
        """One judgement of two drafts on the held-out windows, if there are any."""
        return [Part(HELD_OUT, 2.0 * self.held_out)] * (self.held_out > 0)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of a search, with its settings: takes a draft of a plan, gives the next.

    A stage of one's own is a frozen dataclass with `run`, in the list of a `Method`; all else may stay as it is here.
    """

    rows: ClassVar[tuple[str, ...]] = ()  # of the time table, as `run` enters them
    switches: ClassVar[tuple[str, ...]] = ()  # fields of the settings that choose among what the stage can do
    shared: ClassVar[bool] = False  # by all targets: runs once, before any target is known
    rough: ClassVar[bool] = True  # runs as well where many sparsities are tried for a bound on KL

    @property
    def searches_exponents(self) -> bool:
        """Whether what it leaves has other exponents for every target."""
        return False

    @property
    def asks(self) -> tuple[str, ...]:
        """The answers of a budget problem that serve every target and that the stage needs: "paths", "costs"."""
        return ()

    @property
    def switched(self) -> dict[str, str]:
        """What the stage has of each part that settings switch, by the name of the field."""
        return {}

    def configured(self, settings: Settings) -> Stage:
        """The stage as settings of a whole search have it."""
        return self

    def check(self, model: Model, method: str) -> None:
        """Refuse a model that the stage of a method cannot work on.

        Raises:
            WisparseError: says why.
        """

    def parts(self, size: Size) -> list[Part]:
        """What the stage takes, for the bar and for forecasts; for one target, or for all if it is shared."""
        return [Part(name) for name in self.rows]

    def run(self, search: Context, draft: Draft) -> Draft:
        """Take a draft of the plan and give the next one."""
        raise NotImplementedError


def weights_a_token(config: LlamaConfig) -> int:
    """Weights that a token is multiplied with."""
    return config.num_blocks * sum(config.layer_weights) + config.vocab_size * config.hidden_size
