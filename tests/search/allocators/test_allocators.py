"""Every way to spread a budget meets it, and the exact one is exact."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wisparse_jax.calibration import run_dense
from wisparse_jax.errors import WisparseError
from wisparse_jax.search import SearchSettings
from wisparse_jax.search.allocators import ALLOCATORS, get_allocator
from wisparse_jax.search.allocators.evolution import evolve
from wisparse_jax.search.allocators.paper import UNIT, equal_layers
from wisparse_jax.search.losses import KLLoss
from wisparse_jax.search.problem import BudgetProblem
from wisparse_jax.sparsity.budget import cheapest, lower_hull, project_to_mean

QUICK = SearchSettings(
    population=4,
    generations=2,
    paper_generations=3,
    paper_offspring=4,
    layer_step=0.2,
    gradient_tokens=96,
    block_tokens=48,
    layer_tokens=48,
    statistics_tokens=96,
)


@pytest.fixture(scope="module")
def calibration(tiny_model, tiny_tokens):
    return run_dense(tiny_model, tiny_tokens, QUICK)


@pytest.fixture(scope="module")
def shared(calibration):
    """A problem whose greedy paths and costs are asked for once."""
    return BudgetProblem(calibration, np.zeros((3, 7)), QUICK, 0)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_every_allocator_meets_the_target_within_the_bounds(shared, name):
    weights = shared.weights / shared.weights.sum()
    for target in (0.2, 0.9):
        found = get_allocator(name)(shared.aim(target)).sparsities
        assert found.shape == (3, 7) and found.min() >= 0 and found.max() <= QUICK.max_sparsity + 1e-12
        assert (found @ weights).mean() == pytest.approx(target, abs=1e-12)
        again = get_allocator(name)(shared.aim(target)).sparsities
        np.testing.assert_array_equal(again, found)


def test_an_unknown_allocator_is_refused():
    with pytest.raises(WisparseError, match="allocator = 'magic': expected one of uniform, greedy"):
        get_allocator("magic")


def test_what_was_asked_is_counted_in_tokens(calibration):
    problem = BudgetProblem(calibration, np.zeros((3, 7)), QUICK, 0)
    assert problem.spent.tokens == 0
    problem.kl(np.full((5, 3, 7), 0.5))
    assert problem.spent.tokens == 5 * 48  # two windows of 24 sparse positions
    _ = problem.costs
    assert problem.spent.tokens == 5 * 48 + 3 * 96  # a backward pass counts as two
    steps = sum(len(path.errors) for path in problem.paths)
    before = 5 * 48 + 3 * 96
    assert problem.spent.tokens == pytest.approx(before + steps * 7 * 48 / 3)  # a block is a third of the model
    _ = problem.costs, problem.paths, problem.aim(0.3).paths
    assert problem.spent.tokens == pytest.approx(before + steps * 7 * 48 / 3)


def test_candidates_are_evaluated_with_the_layers_that_they_get(calibration, monkeypatch):
    problem, seen = BudgetProblem(calibration, np.zeros((3, 7)), QUICK, 0), []
    ask = KLLoss.__call__

    def listen(self, exponents, thresholds):
        seen.append(thresholds)
        return ask(self, exponents, thresholds)

    monkeypatch.setattr(KLLoss, "__call__", listen)
    budgets = problem.within_budget(np.array([[0.4, 0.5, 0.6], [0.7, 0.4, 0.4]]))
    asked = []
    monkeypatch.setattr(problem, "_journal", lambda ask, s: (asked.append(s), ask(s))[1])
    found = get_allocator("evolution")(problem)
    assert len(asked) == 3
    candidates = np.concatenate(asked)
    blocks = candidates @ (problem.weights / problem.weights.sum())
    np.testing.assert_allclose(candidates, problem.on_paths(blocks), atol=1e-12)
    assert np.ptp(candidates, axis=2).min() > 0.01  # not all layers of a block alike
    thresholds = [s.thresholds(np.zeros(7), candidates[:, b]) for b, s in enumerate(calibration.statistics)]
    np.testing.assert_array_equal(np.concatenate(seen), np.stack(thresholds, axis=1))
    assert any(np.allclose(found.sparsities, one, atol=1e-12) for one in candidates)
    np.testing.assert_allclose(problem.on_paths(budgets) @ problem.weights / problem.weights.sum(), budgets)


class Known(BudgetProblem):
    """A problem of eight blocks whose KL is a formula of the block budgets."""

    blocks = 8  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]

    def __init__(self, loss, seed=0, **changes):
        self.loss, self.seed, self.target = loss, seed, 0.5
        self.settings = dataclasses.replace(SearchSettings(population=16, generations=25), **changes)
        self.asked, self.progress = [], iter

    def kl(self, layers):  # pyright: ignore[reportIncompatibleMethodOverride]
        self.asked.append(layers[:, :, 0])
        return self.loss(layers[:, :, 0])

    def within_budget(self, budgets):
        return np.stack([project_to_mean(row, np.ones(8), 0.5, 0.0, 0.95) for row in budgets])

    def on_paths(self, budgets):
        return equal_layers(budgets)


def sensitive(budgets):
    return (np.array([8.0, 1, 1, 1, 1, 2, 3, 6]) * np.exp(4 * budgets)).sum(axis=1)


@pytest.mark.parametrize("algorithm", ["CR_FM_NES", "SNES"])
def test_evolution_beats_uniform_and_every_candidate_meets_the_budget(algorithm):
    problem = Known(sensitive, algorithm=algorithm)
    best, history = evolve(problem)
    candidates = np.concatenate(problem.asked)
    assert np.abs(candidates.mean(axis=1) - 0.5).max() < 1e-12
    assert candidates.min() >= 0 and candidates.max() <= 0.95
    assert history["best"][-1] < 0.9 * history["uniform"]
    assert history["best"] == sorted(history["best"], reverse=True)
    assert sensitive(best[None])[0] == pytest.approx(history["best"][-1])
    assert best[0] < best[1] and best[7] < best[4]  # sensitive blocks keep more


def test_another_seed_gives_another_budget():
    runs = [evolve(Known(sensitive, seed))[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert np.abs(runs[0] - runs[2]).max() > 1e-4


def test_uniform_is_kept_when_nothing_beats_it():
    best, history = evolve(Known(lambda b: np.abs(b - 0.5).sum(axis=1), generations=3))
    np.testing.assert_array_equal(best, 0.5)
    assert history["best"] == [history["uniform"]] * 3


@pytest.mark.parametrize("algorithm", ["CR_FM_NES", "SNES"])
def test_infinite_losses_neither_win_nor_spoil_the_strategy(algorithm):
    """A third of the candidates overflow: the rest still evolve."""

    def loss(budgets):
        return np.where(budgets[:, 1] > 0.52, np.inf, sensitive(budgets))

    problem = Known(loss, algorithm=algorithm)
    best, history = evolve(problem)
    assert any(np.isinf(loss(asked)).any() for asked in problem.asked)
    assert np.isfinite(history["best"]).all() and np.isfinite(best).all() and best[1] <= 0.52
    assert history["best"][-1] < 0.97 * history["uniform"]
    assert np.isfinite(np.concatenate(problem.asked)).all()


def test_losses_that_are_not_numbers_become_infinite(calibration):
    zero = np.zeros((3, 7))
    loss = KLLoss(calibration, 48, 2)
    thresholds = np.stack([zero, np.full_like(zero, np.nan)])
    found = loss(zero, thresholds)
    assert found[0] == pytest.approx(0, abs=1e-6) and np.argmin(found) == 0 and not np.isnan(found).any()


def test_the_papers_moves_are_whole_units(shared):
    found = ALLOCATORS["paper"](shared.aim(0.5))
    blocks = found.sparsities @ (shared.weights / shared.weights.sum())
    np.testing.assert_allclose(blocks / UNIT, np.round(blocks / UNIT), atol=1e-9)
    assert len(found.history["best"]) == 3 and found.history["evaluations"] == 12


# --- the exact allocator ---


@st.composite
def problems(draw):
    """Up to four layers of whole weights and costs at seven evenly spaced levels."""
    layers = draw(st.integers(1, 4))
    weights = np.array(draw(st.lists(st.integers(1, 4), min_size=layers, max_size=layers)), float)
    costs = [draw(st.lists(st.floats(0, 10), min_size=6, max_size=6)) for _ in range(layers)]
    curves = np.maximum.accumulate(np.array([[0.0, *row] for row in costs]), axis=1)
    units = draw(st.integers(0, int(6 * weights.sum())))
    return weights, curves, units


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_cheapest_budget_is_that_of_dynamic_programming(problem):
    """On the hulls, in units of a level's step times a weight: every whole budget, exhaustively."""
    weights, curves, units = problem
    levels = np.linspace(0, 0.9, 7)
    hulls = np.stack([lower_hull(levels, curve) for curve in curves])
    total = int(6 * weights.sum())
    best = np.full(total + 1, np.inf)
    best[0] = 0
    for layer, weight in enumerate(weights.astype(int)):
        # Between levels a hull is linear: a weight of w takes w-ths of a step.
        fine = np.interp(np.arange(6 * weight + 1) / weight, np.arange(7), hulls[layer])
        grown = np.full(total + 1, np.inf)
        for have, take in itertools.product(np.flatnonzero(np.isfinite(best)), range(len(fine))):
            grown[have + take] = min(grown[have + take], best[have] + fine[take])
        best = grown
    share = weights / weights.sum()
    target = units * 0.15 / weights.sum()
    found = cheapest(curves, levels, share, target)
    assert abs(found @ share - target) < 1e-12 and found.min() >= 0 and found.max() <= 0.9 + 1e-12
    cost = sum(np.interp(p, levels, hull) for p, hull in zip(found, hulls, strict=True))
    assert cost == pytest.approx(best[units], rel=1e-9, abs=1e-9)
    assert (hulls <= curves + 1e-12).all()


def test_the_hull_is_convex_and_touches():
    x, y = np.arange(5.0), np.array([0.0, 3.0, 2.0, 5.0, 6.0])
    hull = lower_hull(x, y)
    np.testing.assert_allclose(hull, [0, 1, 2, 4, 6])
    assert (np.diff(hull, 2) >= 0).all()


def test_what_has_no_cheapest_budget_is_refused():
    levels, weights = np.array([0.0, 0.5, 0.9]), np.array([0.5, 0.5])
    with pytest.raises(ValueError, match="cost is not finite"):
        cheapest(np.array([[0, 1, np.nan], [0, 1, 2]]), levels, weights, 0.5)
    with pytest.raises(ValueError, match=r"target sparsity 0\.95 is outside"):
        cheapest(np.array([[0.0, 1, 2], [0, 1, 2]]), levels, weights, 0.95)
    np.testing.assert_allclose(cheapest(np.array([[0.0, 1, 2], [0, 1, 2]]), levels, weights, 0.9), 0.9)
