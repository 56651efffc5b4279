"""The bar of a search."""

import re

import numpy as np
import pytest

from wisparse_jax.search.progress import SHARES, TEALS_SEARCH, Progress
from wisparse_jax.search.state import SearchState


def test_stages_move_the_bar_by_their_shares():
    bar = Progress("search", ["statistics", "training"], show=True)
    with bar.stage("statistics"):
        pass
    assert bar._bar.n == 1 and bar._bar.total == 1 + SHARES["training"]
    with bar.stage("training"):
        for number in bar.steps(range(2)):
            assert bar._bar.n == pytest.approx(1 + 0.45 * number * SHARES["training"])
    assert bar._bar.n == pytest.approx(bar._bar.total)
    bar.close()
    assert set(bar.timings) == {"statistics", "training"}


def test_a_stage_that_was_not_foreseen_makes_the_whole_longer():
    bar = Progress("search", ["statistics", "thresholds"], show=True)
    for name in ("statistics", "budgets"):
        with bar.stage(name):
            assert bar._bar.n < bar._bar.total
    assert bar._bar.n == bar._bar.total - 1  # thresholds are to come
    bar.close()


def test_the_comparison_is_long_where_teals_budgets_are_searched_for_it():
    short, long = (Progress("search", ["comparison"], False, compare_teal=teal)._shares for teal in (False, True))
    assert long["comparison"] - short["comparison"] == TEALS_SEARCH and {**long, "comparison": 1.0} == short


def test_a_stage_that_never_came_leaves_the_bar_at_its_end(capsys):
    bar = Progress("search", ["statistics", "training"], show=True)
    with bar.stage("statistics"):
        pass
    bar.close()
    assert "100%" in capsys.readouterr().err.splitlines()[-1]


def test_what_a_former_run_had_found_is_no_work_of_this_one(tmp_path, capsys):
    """A stage that is entered, parts of one, stages that are not: none counts in the rate of which `left` is made."""
    names = ["moments", "basis", "gains", "exponents", "training"]

    def search(until: int) -> Progress:
        state = SearchState(tmp_path / "state", "x")
        bar = Progress("search", names, True, state=state)

        def basis() -> dict[str, np.ndarray]:
            for name in names[:2]:
                with bar.stage(name):
                    pass
            return {}

        state.keep("basis", basis)
        bar.pass_by("moments", "basis")
        with bar.stage("gains"):
            state.keep("gains", dict)
        with bar.stage("exponents"):
            for block in bar.steps(range(3)):
                if block == until:
                    return bar  # the stage ends there
                state.keep(f"block {block}", dict)
        return bar

    first, again = search(until=2), search(until=3)
    done = sum(SHARES[name] for name in names[:-1])
    left = 0.4 * SHARES["exponents"]  # the third block of nine tenths, and the last tenth
    assert first._bar.initial == 0 and first._bar.n == pytest.approx(done) == again._bar.n
    assert again._bar.initial == pytest.approx(done - left)
    again._bar.start_t -= 600
    again._bar.refresh()
    seconds = 600 * SHARES["training"] / left
    shown = re.findall(r"10:0\d, about (\d\d):(\d\d) left", capsys.readouterr().err)[-1]
    assert 60 * int(shown[0]) + int(shown[1]) == pytest.approx(seconds, abs=10)
