"""The bar of a search."""

import re
import time

import numpy as np
import pytest

from wisparse_jax import bars
from wisparse_jax.search import METHODS, SearchSettings
from wisparse_jax.search.cost import expected
from wisparse_jax.search.forecast import Part
from wisparse_jax.search.progress import Progress
from wisparse_jax.search.stages import Size
from wisparse_jax.search.state import SearchState

TOKENS = {"moments": 20.0, "basis": 140.0, "gains": 20.0, "exponents": 60.0, "training": 140.0}


def parts(*names):
    """The stages with their tokens, and nothing to compile."""
    return [Part(name, TOKENS.get(name, 10.0), programs=0) for name in names]


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setattr(bars, "redraws", lambda: True)


def test_a_step_of_a_stage_is_a_part_of_it():
    now = [0.0]
    bar = Progress("search", parts("statistics", "training"), show=True, clock=lambda: now[0])
    with bar.stage("statistics"):
        now[0] += 1.0
    with bar.stage("training"):
        left = []
        for _ in bar.steps(range(4)):
            left.append(bar.forecast.left)
            now[0] += 14.0
        assert left == [140.0, 105.0, 70.0, 35.0] and bar.forecast.left == 0
    assert bar.forecast.seconds() == 0
    bar.close()
    assert bar.timings == {"statistics": 1.0, "training": 56.0}


def test_a_stage_without_steps_is_shown_while_it_runs(capsys, monkeypatch):
    """A line every so often, with less left in each; none once the stage has ended, by an error as well."""
    monkeypatch.setattr(bars, "redraws", lambda: False)
    monkeypatch.setattr(bars, "EVERY", 0.1)
    bar = Progress("search", [Part("moments", 100.0, programs=0)], True, rates={"forward": 1.0})

    @bar.stage("moments")
    def fails():
        time.sleep(2.5)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    lines = capsys.readouterr().err.splitlines()
    left = [re.search(r"gone, about 01:(\d\d) left$", line) for line in lines if line.startswith("search: moments: ")]
    seconds = [int(found[1]) for found in left if found]
    assert len(seconds) >= 2 and seconds == sorted(seconds, reverse=True) and seconds[-1] < seconds[0] <= 40
    time.sleep(1.2)
    assert capsys.readouterr().err == ""


def test_two_loops_of_one_stage_share_what_it_has():
    bar = Progress("search", parts("training"), show=False)
    with bar.stage("training"):
        for _ in bar.steps(range(2), 40.0):
            pass
        assert bar.forecast.left == 100.0
        for _ in bar.steps(range(5)):
            pass
        assert bar.forecast.left == 0


def test_what_steps_have_left_when_a_stage_ends_is_no_work():
    """Training that stops early says nothing of how fast the rest would have been."""
    now = [0.0]
    bar = Progress("search", parts("training", "training"), show=False, clock=lambda: now[0])
    with bar.stage("training"):
        for step in bar.steps(range(10)):
            now[0] += 1.0
            if step == 4:
                break
    assert bar.forecast.seconds() == pytest.approx(10.0, rel=0.3)


def test_a_stage_that_was_not_foreseen_changes_nothing_of_what_is_left():
    bar = Progress("search", parts("statistics", "thresholds"), show=True)
    before = bar.forecast.seconds()
    with bar.stage("budgets"):
        pass
    assert bar.forecast.seconds() == before > 0
    bar.close()


def test_teals_budgets_are_priced_where_they_are_searched_for_alone(tiny_config):
    made = []
    for teal in (False, True):
        stages = tuple(stage.configured(SearchSettings(compare_teal=teal)) for stage in METHODS["uniform"].all_stages)
        made.append(expected(Size(tiny_config, 96, 48, stages), targets=2))
    short, long = ([part.tokens for part in bar if part.name == "comparison"] for bar in made)
    assert len(short) == len(long) == 2 and short[0] == short[1] == 2 * 48
    assert long[0] > 100 * long[1] and long[1] == 3 * 48  # one search serves both targets


def test_a_stage_that_never_came_leaves_the_bar_at_its_end(capsys):
    bar = Progress("search", parts("statistics", "training"), show=True)
    with bar.stage("statistics"):
        pass
    bar.close()
    assert "100%" in capsys.readouterr().err.splitlines()[-1]


def test_what_a_former_run_had_found_is_no_work_of_this_one(tmp_path):
    """A stage that is entered, parts of one, stages that are not: none counts in the rate of which `left` is made."""
    names = ["moments", "basis", "gains", "exponents", "training"]
    now = [0.0]

    def search(until: int, seconds: float) -> Progress:
        state = SearchState(tmp_path / "state", "x")
        bar = Progress("search", parts(*names), False, state=state, clock=lambda: now[0])

        def work() -> dict[str, np.ndarray]:
            now[0] += seconds
            return {}

        def basis() -> dict[str, np.ndarray]:
            for name in names[:2]:
                with bar.stage(name):
                    work()
            return {}

        state.keep("basis", basis)
        bar.pass_by("moments", "basis")
        with bar.stage("gains"):
            state.keep("gains", work)
        with bar.stage("exponents"):
            for block in bar.steps(range(3)):
                if block == until:
                    return bar  # the stage ends there
                state.keep(f"block {block}", work)
        return bar

    search(until=2, seconds=1.0)
    again = search(until=3, seconds=60.0)  # of which the third block alone is work: 20 tokens
    assert again.forecast.seconds() == pytest.approx(TOKENS["training"] / 20.0 * 60.0)
