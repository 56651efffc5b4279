"""The bar of a search."""

import pytest

from wisparse_jax.search.progress import SHARES, TEALS_SEARCH, Progress


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
