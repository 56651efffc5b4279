"""What is left of a search, by a clock that the test moves."""

from __future__ import annotations

import re

import pytest

from wisparse_jax import bars
from wisparse_jax.compile_clock import compile_clock
from wisparse_jax.search.forecast import COMPILING, KINDS, Forecast, Part
from wisparse_jax.search.progress import Progress

# A search as `quick` is: the basis and the training are most of it, and neither has begun at a tenth.
PARTS = [
    Part("statistics", 8_000, programs=2),
    Part("held out", 1_000, programs=2),
    Part("moments", 14_000, kind="gradients", programs=3),
    Part("basis", 90_000, kind="basis", programs=4),
    Part("gains", 6_000, kind="gradients"),
    Part("held out", 2_000),
    Part("training", 48_000, kind="training", programs=3),
    Part("thresholds", 8_000),
]
TICKS = {"basis": 11, "training": 20}


class Machine:
    """Seconds of each kind of work on some machine, and a clock that only its work moves."""

    def __init__(self, slower: float, **seconds: float):
        self.now, self.rates = 1000.0, {kind: slower * factor * 1e-3 for kind, factor in (KINDS | seconds).items()}

    def clock(self) -> float:
        return self.now

    def work(self, kind: str, tokens: float) -> None:
        self.now += tokens * self.rates[kind]

    def compile(self, programs: int) -> None:
        self.now += 1.5 * programs
        compile_clock().seconds += 1.5 * programs


def search(machine: Machine, bar: Progress, parts: list[Part]) -> list[tuple[float, float]]:
    """Run the parts; what was over and what was said to be left at every look at the bar."""
    looks = []
    for part in parts:
        with bar.stage(part.name):
            machine.compile(part.programs)
            ticks = TICKS.get(part.name, 1)
            for _ in bar.steps(range(ticks)) if ticks > 1 else [0]:
                looks.append((machine.now - 1000.0, bar.forecast.seconds()))
                machine.work(part.kind, part.tokens / ticks)
        looks.append((machine.now - 1000.0, bar.forecast.seconds()))
    return looks


@pytest.mark.parametrize(
    ("machine", "measured"),
    [
        (Machine(1.0), 1.0),
        (Machine(3.0), 3.0),
        (Machine(30.0), None),  # nothing was measured: proportions are all that is known
        (Machine(2.0), 1.7),  # busier now than when it was measured
        (Machine(1.0, gradients=3.25, basis=1.1, training=2.2), 1.0),  # a machine of other proportions
    ],
)
def test_a_forecast_is_within_30_percent_from_a_tenth_of_the_way_on(machine: Machine, measured: float | None) -> None:
    rates = None if measured is None else {kind: measured * factor * 1e-3 for kind, factor in KINDS.items()}
    looks = search(machine, Progress("search", PARTS, False, rates=rates, clock=machine.clock), PARTS)
    whole = looks[-1][0]
    later = [(over, left) for over, left in looks if over >= whole / 10]
    assert len(later) > 30
    for over, left in later:
        assert abs(left - (whole - over)) <= 0.3 * (whole - over), f"{over:.0f} s of {whole:.0f}: {left:.0f} left"
    assert looks[-1][1] == 0


def test_a_wrong_proportion_is_mended_by_the_stages_own_first_steps() -> None:
    """Training takes five times what was expected of it: wrong until it begins, right after its first step."""
    machine = Machine(1.0, training=12.0)
    rates = {kind: factor * 1e-3 for kind, factor in KINDS.items()}
    looks = search(machine, Progress("search", PARTS, False, rates=rates, clock=machine.clock), PARTS)
    whole = looks[-1][0]
    wrong = [abs(left / (whole - over) - 1) for over, left in looks if over < whole]
    assert max(wrong) > 0.5 and max(wrong[-20:]) < 0.05


def test_the_share_that_is_over_never_falls_though_a_forecast_grows(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bars, "redraws", lambda: True)
    machine = Machine(1.0, training=24.0)
    bar = Progress("search", PARTS, True, rates={k: f * 1e-3 for k, f in KINDS.items()}, clock=machine.clock)
    bar._bar.mininterval = 0
    search(machine, bar, PARTS)
    bar.close()
    shown = re.findall(r"(\d+)%\|", capsys.readouterr().err)
    shares = [int(share) for share in shown]
    assert shares == sorted(shares) and shares[-1] == 100 and len(set(shares)) > 10


def test_what_is_compiled_is_told_from_what_was_compiled_and_is_no_work() -> None:
    forecast = Forecast([Part("one", 100, programs=2), Part("two", 100, programs=3)], {"forward": 0.1})
    assert forecast.seconds() == pytest.approx(20 + 5 * COMPILING)
    forecast.begin("one")
    forecast.work(100, 10.0)
    forecast.end(compiled=1.0)
    assert forecast.seconds() == pytest.approx(10 + 3 * 0.5)


def test_what_was_not_foreseen_tells_nothing_of_the_rest() -> None:
    forecast = Forecast([Part("one", 100, programs=0)], {"forward": 0.1})
    forecast.begin("another")
    forecast.work(50, 1000.0)
    forecast.end(compiled=0.0)
    assert forecast.seconds() == pytest.approx(10)


def test_time_since_the_last_step_counts_down_and_not_below_nothing() -> None:
    forecast = Forecast([Part("one", 100, programs=0), Part("two", 100, programs=0)], {"forward": 0.1})
    forecast.begin("one")
    assert [forecast.seconds(since) for since in (0.0, 4.0, 40.0)] == pytest.approx([20, 16, 10])


def test_every_kind_of_work_has_a_rate(repository) -> None:
    from wisparse_jax.models.config import read_config
    from wisparse_jax.search import METHODS, SearchSettings
    from wisparse_jax.search.cost import search_parts

    config = read_config(repository / "configs" / "llama-3.1-8b.json")
    parts = [part for name in METHODS for part in search_parts(config, name, SearchSettings())]
    assert {part.kind for part in parts} == set(KINDS)
