"""The three searches on losses whose answer is known."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wisparse_jax.search import SearchSettings
from wisparse_jax.search.block_budgets import evolve_block_budgets
from wisparse_jax.search.exponents import search_exponents
from wisparse_jax.search.layer_budgets import greedy_path, on_path
from wisparse_jax.search.statistics import BlockStatistics

WEIGHTS = np.array([4.0, 1.0, 1.0, 4.0, 11.0, 11.0, 11.0])


class Identity(BlockStatistics):
    """Statistics whose threshold is the sparsity itself."""

    def threshold(self, layer, exponent, sparsity):
        return sparsity

    def thresholds(self, exponents, sparsities):
        return sparsities


IDENTITY = Identity({}, {})


def test_exponents_find_the_minimum_of_a_coupled_loss_and_never_raise_it():
    best = np.array([0.0, 0.5, 1.0, 1.5, 0.25, 0.75, 1.25])
    grid = tuple(np.arange(0, 1.51, 0.25))

    def loss(alphas, taus):
        d = alphas - best
        return (d**2).sum(axis=1) + 0.3 * d[:, 0] * d[:, 1]

    found, errors = search_exponents(loss, IDENTITY, np.zeros(7), np.full(7, 0.5), grid, 3)
    np.testing.assert_allclose(found, best)
    assert errors == sorted(errors, reverse=True) and errors[-1] == pytest.approx(0)


def test_exponents_stay_when_nothing_is_better():
    grid = (0.0, 0.5, 1.0)
    found, errors = search_exponents(lambda a, t: np.ones(len(a)), IDENTITY, np.full(7, 0.5), np.full(7, 0.5), grid, 3)
    np.testing.assert_array_equal(found, 0.5)
    assert len(errors) == 2  # one pass sees that nothing changes


def layer_loss(costs):
    return lambda alphas, taus: (costs * WEIGHTS / WEIGHTS.sum() * taus**2).sum(axis=1)


@pytest.fixture(scope="module")
def path():
    costs = np.array([1.0, 2.0, 9.0, 1.0, 3.0, 3.0, 1.0])
    return greedy_path(layer_loss(costs), IDENTITY, np.zeros(7), WEIGHTS, 0.7, 0.02, 0.95), costs


def test_the_greedy_path_grows_one_layer_a_step_to_its_target(path):
    (steps, errors), _ = path
    assert (np.diff(steps, axis=0) >= 0).all() and ((np.diff(steps, axis=0) > 0).sum(axis=1) == 1).all()
    assert steps[0].max() == 0 and steps.max() <= 0.95
    assert steps[-1] @ WEIGHTS / WEIGHTS.sum() >= 0.7 and len(errors) == len(steps)


def test_the_greedy_path_finds_the_optimum_of_a_separable_convex_loss(path):
    """For quadratic costs c_l p_l^2 the optimum at a budget has p_l proportional to 1 / c_l."""
    (steps, _), costs = path
    at = on_path(steps, WEIGHTS, 0.3)
    expected = (1 / costs) * 0.3 / (WEIGHTS / costs).sum() * WEIGHTS.sum()
    np.testing.assert_allclose(at, expected, atol=0.1)
    assert layer_loss(costs)(None, at[None])[0] < 1.05 * layer_loss(costs)(None, expected[None])[0]


@settings(max_examples=50, deadline=None)
@given(target=st.floats(0.0, 0.7))
def test_a_point_on_the_path_meets_its_target_exactly(path, target):
    (steps, _), _ = path
    assert abs(on_path(steps, WEIGHTS, target) @ WEIGHTS / WEIGHTS.sum() - target) < 1e-9


def test_targets_beyond_the_path_or_the_bounds_are_refused(path):
    (steps, _), costs = path
    with pytest.raises(ValueError, match="the path ends at"):
        on_path(steps, WEIGHTS, 0.9)
    with pytest.raises(ValueError, match="above the largest layer sparsity"):
        greedy_path(layer_loss(costs), IDENTITY, np.zeros(7), WEIGHTS, 0.99, 0.02, 0.95)


BUDGET = SearchSettings(population=16, generations=25)
BLOCKS = np.ones(8)


def block_fitness(seen=None):
    sensitivity = np.array([8.0, 1, 1, 1, 1, 2, 3, 6])

    def fitness(budgets):
        if seen is not None:
            seen.append(budgets)
        return (sensitivity * np.exp(4 * budgets)).sum(axis=1)

    return fitness


@pytest.mark.parametrize("algorithm", ["CR_FM_NES", "CMA_ES", "Sep_CMA_ES", "SNES"])
def test_evolution_beats_uniform_and_every_candidate_meets_the_budget(algorithm):
    seen = []
    chosen = dataclasses.replace(BUDGET, algorithm=algorithm)
    best, history = evolve_block_budgets(block_fitness(seen), BLOCKS, 0.5, chosen, 0)
    candidates = np.concatenate(seen)
    assert np.abs(candidates.mean(axis=1) - 0.5).max() < 1e-12
    assert candidates.min() >= 0 and candidates.max() <= 0.95
    assert history["best"][-1] < 0.9 * history["uniform"]
    assert history["best"] == sorted(history["best"], reverse=True)
    assert block_fitness()(best[None])[0] == pytest.approx(history["best"][-1])
    assert best[0] < best[1] and best[7] < best[4]  # sensitive blocks keep more


def test_same_seed_same_budget_and_another_seed_another():
    runs = [evolve_block_budgets(block_fitness(), BLOCKS, 0.5, BUDGET, seed)[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert np.abs(runs[0] - runs[2]).max() > 1e-4


def test_uniform_is_kept_when_nothing_beats_it():
    best, history = evolve_block_budgets(
        lambda b: np.abs(b - 0.5).sum(axis=1), BLOCKS, 0.5, dataclasses.replace(BUDGET, generations=3), 0
    )
    np.testing.assert_array_equal(best, 0.5)
    assert history["best"] == [history["uniform"]] * 3
