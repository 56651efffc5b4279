"""One bar for a whole search, with a forecast of what is left."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from wisparse_jax.bars import bar
from wisparse_jax.compile_clock import compile_clock
from wisparse_jax.search.forecast import Forecast, Part
from wisparse_jax.search.state import SearchState


class Progress:
    """The stages of a search, timed, and shown on standard error if `show`; see `Forecast`.

    The bar shows the share of this run's time that is over. What a former run had kept in `state` is no work of this
    one, and tells nothing of its speed.
    """

    def __init__(
        self,
        title: str,
        stages: Sequence[Part],
        show: bool,
        state: SearchState | None = None,
        rates: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._state = SearchState() if state is None else state
        self._known = self._counts()
        self.timings: dict[str, float] = {}
        self.forecast = Forecast(stages, rates)
        self._clock, self._compile_clock = clock, compile_clock()
        self._began = self._last = clock()
        self._compiled = self._compile_clock.seconds
        layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
        self._bar = bar(total=1.0, desc=title, disable=not show, bar_format=layout)
        self._title = title

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body as a stage."""
        self._bar.set_description_str(f"{self._title}: {name}", refresh=False)
        started, compiled = self._clock(), self._compile_clock.seconds
        self.forecast.begin(name)
        self._known, self._last, self._compiled, self._ticked = self._counts(), started, compiled, False
        self.show()
        over = threading.Event()
        if not self._bar.disable:  # also while a long step is under way
            threading.Thread(target=self._keep_showing, args=(over,), daemon=True).start()
        try:
            yield
        finally:
            over.set()
            self.timings[name] = self.timings.get(name, 0.0) + self._clock() - started
        if not self._ticked:  # what steps have left was not needed
            self._work(self.forecast.left)
        self.forecast.end(self._compile_clock.seconds - compiled)
        self.show()

    def _keep_showing(self, over: threading.Event) -> None:
        while not over.wait(max(1.0, self._bar.mininterval)):
            self.show()

    def steps(self, numbers: Iterable[int], tokens: float | int | None = None) -> Iterator[int]:
        """The numbers, each of which does its part of so many tokens, or of all that the stage has left."""
        listed = list(numbers)
        part = (self.forecast.left if tokens is None else tokens) / max(1, len(listed))
        for number in listed:
            self._ticked = True
            yield number
            self._work(part)
            self.show()

    def pass_by(self, *names: str) -> None:
        """Leave out stages that were not entered, if what they find had been kept."""
        if self._was_kept():
            for name in names:
                self.forecast.skip(name)
            self.show()

    def show(self) -> None:
        """How much of the time is over and how much is left, as far as is known now."""
        if self._bar.disable:
            return
        now = self._clock()
        over, left = now - self._began, self.forecast.seconds(now - self._last)
        self._bar.set_postfix_str(f"about {self._bar.format_interval(left)} left", refresh=False)
        # A forecast may grow, but what was over is over.
        self._bar.n = max(self._bar.n, over / (over + left) if over + left else 0.0)
        # tqdm shows what has moved, but here a forecast is news as well.
        if (now := time.time()) - self._bar.last_print_t >= self._bar.mininterval:
            self._bar.refresh()
            self._bar.last_print_t = now

    def close(self) -> None:
        """The search is over, also where stages that it may have were not needed; the last line stays."""
        if not self._bar.disable:
            self._bar.set_postfix_str("", refresh=False)
            self._bar.n = 1.0
        self._bar.close()

    def _work(self, tokens: float | int) -> None:
        """So many tokens were done since the last."""
        now, compiled = self._clock(), self._compile_clock.seconds
        if self._was_kept():
            self.forecast.drop(tokens)
        else:
            self.forecast.work(tokens, max(0.0, now - self._last - (compiled - self._compiled)))
        self._last, self._compiled = now, compiled

    def _counts(self) -> tuple[int, int]:
        return self._state.read, self._state.found

    def _was_kept(self) -> bool:
        """Whether what was done since this was last asked was to read what a former run had found."""
        (read, found), self._known = self._known, self._counts()
        return self._known[0] > read and self._known[1] == found
