"""One bar for a whole search, with an estimate of what is left, by the speed of this run alone."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from wisparse_jax.search.state import SearchState
from wisparse_jax.sparsity.methods import Method

# Rough shares of a search's time; a stage that is not named has 1.
SHARES = {
    "moments": 2.0,
    "basis": 14.0,
    "gains": 2.0,
    "exponents": 6.0,
    "final exponents": 6.0,
    "budgets": 4.0,
    "training": 14.0,
    "held out": 0.5,
    "comparison": 1.0,
}
TEALS_SEARCH = 7.0  # share of a comparison beyond its own, where TEAL's budgets are searched for it
# What allocators start from, whose result is held against it on windows that are held out.
STARTS = {"evolution": "greedy", "second-order": "uniform"}


def trains(method: Method) -> bool:
    """Whether a method has a stage of training."""
    return method.biases or method.gains == "trained"


def stages(method: Method, judged: bool, targets: int) -> list[str]:
    """A search's stages as often as they come, unless one is dropped; `judged` if windows are held out."""
    held_out = ["held out"] * judged
    once = ["statistics", "held out"]
    if method.basis != "none":
        once += ["moments", "basis", "statistics", "held out", *held_out]
    if method.gains != "norms":
        once += ["gains", "held out", *held_out]
    each = ["budgets", *held_out * (method.allocator in STARTS), "thresholds", "comparison"]
    each += ["training"] * (judged and trains(method))
    each += ["exponents", *held_out, "final exponents", *held_out] * method.search_exponents
    return once + each * targets


class Progress:
    """The stages of a search, timed, and shown on standard error if `show`.

    What a former run had kept in `state` moves the bar on without counting as work of this run.
    """

    def __init__(
        self,
        title: str,
        stages: list[str],
        show: bool,
        compare_teal: bool = False,
        state: SearchState | None = None,
    ):
        from tqdm import tqdm

        self._state = SearchState() if state is None else state
        self._known = self._counts()
        self.timings: dict[str, float] = {}
        self._end, self._ahead = 0.0, Counter(stages)
        self._shares = SHARES | {"comparison": SHARES["comparison"] + TEALS_SEARCH * compare_teal}
        total = sum(self._shares.get(name, 1.0) for name in stages)
        layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left"
        # What is left is estimated from the whole search so far: stages pass at different speeds.
        self._bar = tqdm(total=total, desc=title, disable=not show, bar_format=layout, smoothing=0)
        self._title = title

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body as a stage; one that was not among those to come makes the whole longer."""
        if self._ahead[name]:
            self._ahead[name] -= 1
        else:
            self._bar.total += self._shares.get(name, 1.0)
        self._bar.set_description_str(f"{self._title}: {name}")
        started = time.perf_counter()
        self._end, self._known = self._bar.n + self._shares.get(name, 1.0), self._counts()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - started
        self._advance(self._end - self._bar.n)

    def steps(self, numbers: Iterable[int]) -> Iterator[int]:
        """The numbers, each moving the bar on by its part of nine tenths of what the stage has left."""
        listed = list(numbers)
        part = 0.9 * (self._end - self._bar.n) / max(1, len(listed))
        for number in listed:
            yield number
            self._advance(part)

    def pass_by(self, *names: str) -> None:
        """Move on by stages that were not entered, if what they find had been kept."""
        if self._was_kept():
            for name in names:
                self._ahead[name] -= 1
                self._move(self._shares.get(name, 1.0), kept=True)

    def _counts(self) -> tuple[int, int]:
        return self._state.read, self._state.found

    def _was_kept(self) -> bool:
        """Whether what was done since this was last asked was to read what a former run had found."""
        (read, found), self._known = self._known, self._counts()
        return self._known[0] > read and self._known[1] == found

    def _advance(self, part: float) -> None:
        self._move(max(0.0, part), self._was_kept())

    def _move(self, part: float, kept: bool) -> None:
        if kept and not self._bar.disable:  # a bar that is not shown has no beginning
            self._bar.initial += part  # tqdm's rate is of what lies beyond
        self._bar.update(part)

    def close(self) -> None:
        """The search is over, also where stages that it may have were not needed; the last line stays."""
        self._advance(self._bar.total - self._bar.n)
        self._bar.close()
