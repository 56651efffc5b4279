"""One bar for a whole search, with an estimate of what is left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator

# Rough shares of a search's time; a stage that is not named has 1.
SHARES = {
    "statistics": 1.0,
    "moments": 2.0,
    "basis": 6.0,
    "gains": 1.5,
    "exponents": 6.0,
    "final exponents": 6.0,
    "budgets": 6.0,
    "thresholds": 1.0,
    "biases": 6.0,
    "held out": 2.0,
}


class Progress:
    """The stages of a search, timed, and shown on standard error if `show`."""

    def __init__(self, title: str, stages: list[str], show: bool):
        from tqdm import tqdm

        self.timings: dict[str, float] = {}
        self._end, total = 0.0, sum(SHARES.get(name, 1.0) for name in stages)
        layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left"
        self._bar = tqdm(total=total, desc=title, disable=not show, bar_format=layout)
        self._title = title

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body as a stage; it may come several times."""
        self._bar.set_description_str(f"{self._title}: {name}")
        started = time.perf_counter()
        self._end = self._bar.n + SHARES.get(name, 1.0)
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

    def _advance(self, part: float) -> None:
        # Stages that come again take more than was thought: the bar waits at its end.
        self._bar.update(max(0.0, min(part, self._bar.total - self._bar.n)))

    def close(self) -> None:
        """Leave the last line as it is."""
        self._bar.close()
