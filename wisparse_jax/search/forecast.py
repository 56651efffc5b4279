"""How long the rest of a search will take: what is to be done, by kind of work, at the speed of this machine.

A kind's speed is that of this run as soon as it has done some of it. Until then it is what was measured or assumed
beforehand, corrected by how the work that is done compares with what was assumed of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Seconds of a token of each kind of work, in those of a token that is read: SmolLM2-135M and the demo on CPU cores; of
# losses, whose first block tells, a guess.
KINDS = {"forward": 1.0, "gradients": 2.5, "basis": 1.2, "losses": 2.0, "training": 2.4}
COMPILING = 2.0  # seconds of a program, as long as none was compiled
UNKNOWN = "unknown"  # kind of what was not foreseen
TRUST = 0.25  # share of a search whose work weighs as much as what was measured before it


class Part(NamedTuple):
    """A row of the time table that a stage adds to, each time that it is entered."""

    name: str
    tokens: float = 0.0  # through the model, or work as much as that
    once: float = 0.0  # such tokens that a search for several targets spends once, if the stage runs for each
    kind: str = "forward"  # of work, of `KINDS`: how long a token takes
    programs: int = 2  # that are compiled for it, those that take long alone


class Forecast:
    """What a search has done, has at hand and has ahead.

    Args:
        ahead: the rows of the time table that are to come, in order.
        rates: seconds of a token of each kind of work; None where nothing was measured, and only proportions count.
    """

    def __init__(self, ahead: Sequence[Part], rates: Mapping[str, float] | None = None):
        self._ahead, self._rates = list(ahead), dict(KINDS if rates is None else rates)
        self._trusted = 0.0 if rates is None else TRUST * sum(self._assumed(p.kind, p.tokens) for p in ahead)
        self._done: dict[str, tuple[float, float]] = {}  # tokens and seconds of each kind
        self._programs, self._compiled = 0, 0.0
        self._part, self._left = Part("", programs=0), 0.0

    def begin(self, name: str) -> None:
        """The stage of a row begins."""
        at = self._first(name)
        # What was not foreseen tells nothing of the speed of any kind.
        self._part = Part(name, kind=UNKNOWN, programs=0) if at is None else self._ahead.pop(at)
        self._left = self._part.tokens

    def skip(self, name: str) -> None:
        """What a row would have taken is not needed."""
        if (at := self._first(name)) is not None:
            self._ahead.pop(at)

    @property
    def left(self) -> float | int:
        """Tokens that the stage at hand has left."""
        return self._left

    def work(self, tokens: float | int, seconds: float) -> None:
        """So much of the stage at hand was done in so many seconds, compiling aside."""
        self.drop(tokens)
        if self._part.kind == UNKNOWN:
            return
        before = self._done.get(self._part.kind, (0.0, 0.0))
        self._done[self._part.kind] = before[0] + tokens, before[1] + seconds

    def drop(self, tokens: float | int) -> None:
        """So much of the stage at hand was not needed."""
        self._left = max(0.0, self._left - tokens)

    def end(self, compiled: float) -> None:
        """The stage at hand is over; so many seconds of it went into compiling."""
        self._programs, self._compiled = self._programs + self._part.programs, self._compiled + compiled
        self._part, self._left = Part("", programs=0), 0.0

    def seconds(self, since: float = 0.0) -> float:
        """Of all that is left, where the last work that is known of was done so many seconds ago."""
        at_hand = max(0.0, self._left * self._rate(self._part.kind) - since)
        programs = sum(part.programs for part in self._ahead)
        ahead = sum(part.tokens * self._rate(part.kind) for part in self._ahead)
        return at_hand + ahead + programs * (self._compiled / self._programs if self._programs else COMPILING)

    def _rate(self, kind: str) -> float:
        tokens, seconds = self._done.get(kind, (0.0, 0.0))
        if tokens:
            return seconds / tokens
        assumed = self._trusted + sum(self._assumed(known, done) for known, (done, _) in self._done.items())
        found = self._trusted + sum(seconds for _, seconds in self._done.values())
        return self._assumed(kind, 1.0) * (found / assumed if assumed else 1.0)

    def _assumed(self, kind: str, tokens: float | int) -> float:
        return tokens * self._rates.get(kind, self._rates["forward"])

    def _first(self, name: str) -> int | None:
        return next((i for i, part in enumerate(self._ahead) if part.name == name), None)
