"""Exponents and greedy paths on losses whose answer is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wisparse_jax.calibration.statistics import BlockStatistics
from wisparse_jax.search.exponents import search_exponents
from wisparse_jax.search.greedy_path import greedy_path

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

    def loss(alphas, thresholds):
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


def test_every_layer_is_tried_at_its_own_sparsity():
    """Whatever the candidates are, a layer's threshold is that of its own sparsity."""
    own, seen = np.linspace(0.1, 0.7, 7), []

    def loss(alphas, thresholds):
        seen.append(thresholds)
        return (alphas - 0.5).__pow__(2).sum(axis=1)

    found, _ = search_exponents(loss, IDENTITY, np.zeros(7), own, (0.0, 0.5, 1.0), 2)
    np.testing.assert_array_equal(found, 0.5)
    for thresholds in seen:
        np.testing.assert_array_equal(thresholds, np.tile(own, (3, 1)))


def test_a_thresholds_share_of_the_error_is_that_of_its_exponent():
    """Candidates differ in their thresholds too, of which the best one's is kept for the layers behind."""

    class Rising(Identity):
        def threshold(self, layer, exponent, sparsity):
            return exponent + sparsity

        def thresholds(self, exponents, sparsities):
            return exponents + sparsities

    own = np.linspace(0.1, 0.7, 7)

    def loss(alphas, thresholds):
        np.testing.assert_allclose(thresholds, alphas + own)
        return ((alphas - 1) ** 2).sum(axis=1)

    found, errors = search_exponents(loss, Rising({}, {}), np.zeros(7), own, (0.0, 0.5, 1.0), 3)
    np.testing.assert_array_equal(found, 1.0)
    assert errors == [7.0, 0.0, 0.0]


def layer_loss(costs):
    return lambda alphas, thresholds: (costs * WEIGHTS / WEIGHTS.sum() * thresholds**2).sum(axis=1)


@pytest.fixture(scope="module")
def path():
    costs = np.array([1.0, 2.0, 9.0, 1.0, 3.0, 3.0, 1.0])
    return greedy_path(layer_loss(costs), IDENTITY, np.zeros(7), WEIGHTS, 0.7, 0.02, 0.95), costs


def test_the_greedy_path_grows_one_layer_a_step_to_its_target(path):
    (steps, errors), _ = path
    assert (np.diff(steps, axis=0) >= 0).all() and ((np.diff(steps, axis=0) > 0).sum(axis=1) == 1).all()
    assert steps[0].max() == 0 and steps.max() <= 0.95
    assert steps[-1] @ WEIGHTS / WEIGHTS.sum() >= 0.7 and len(errors) == len(steps)
    # Equal work a step, but for small layers, of which a step would skip a fifth at once.
    largest = np.diff(steps, axis=0).max(axis=0)
    np.testing.assert_allclose(largest, [0.055, 0.1, 0.1, 0.055, 0.02, 0.02, 0.02], atol=1e-12)


def test_the_greedy_path_finds_the_optimum_of_a_separable_convex_loss(path):
    """For quadratic costs c_l p_l^2 the optimum at a budget has p_l proportional to 1 / c_l."""
    _, costs = path
    at = path[0].at(WEIGHTS, np.array([0.3]))[0]
    expected = (1 / costs) * 0.3 / (WEIGHTS / costs).sum() * WEIGHTS.sum()
    np.testing.assert_allclose(at, expected, atol=0.1)
    assert layer_loss(costs)(None, at[None])[0] < 1.05 * layer_loss(costs)(None, expected[None])[0]


def test_the_greedy_path_takes_no_step_beyond_its_target():
    """Seven steps of a tenth of a seventh each, and no eighth for a rounding; up to the bound itself, if need be."""
    even = np.ones(7)
    found = greedy_path(lambda a, t: (t**2).sum(axis=1), IDENTITY, np.zeros(7), even, 0.1, 0.1, 0.95)
    np.testing.assert_allclose(found.sparsities[-1], 0.1)
    assert len(found.errors) == 8 and found.errors[0] == 0
    np.testing.assert_allclose(found.errors[-1], 7 * 0.1**2)
    np.testing.assert_allclose(found.at(even, found.sparsities @ even / 7), found.sparsities, atol=1e-12)
    whole = greedy_path(lambda a, t: (t**2).sum(axis=1), IDENTITY, np.zeros(7), even, 0.95, 0.1, 0.95)
    np.testing.assert_allclose(whole.sparsities[-1], 0.95)


@settings(max_examples=50, deadline=None)
@given(target=st.floats(0.0, 0.7))
def test_a_point_on_the_path_meets_its_target_exactly(path, target):
    assert abs(path[0].at(WEIGHTS, np.array([target]))[0] @ WEIGHTS / WEIGHTS.sum() - target) < 1e-9


def test_targets_beyond_the_path_or_the_bounds_are_refused(path):
    found, costs = path
    with pytest.raises(ValueError, match="the path ends at"):
        found.at(WEIGHTS, np.array([0.2, 0.9]))
    with pytest.raises(ValueError, match="above the largest layer sparsity"):
        greedy_path(layer_loss(costs), IDENTITY, np.zeros(7), WEIGHTS, 0.99, 0.02, 0.95)


def test_a_candidate_that_overflows_is_never_chosen():
    """Losses come with infinity in place of what is not a number; a layer whose every step overflows stays dense."""
    costs = np.array([1.0, 2.0, 9.0, 1.0, 3.0, 3.0, 1.0])

    def loss(alphas, thresholds):
        return np.where(thresholds[:, 0] > 0, np.inf, layer_loss(costs)(alphas, thresholds))

    found = greedy_path(loss, IDENTITY, np.zeros(7), WEIGHTS, 0.5, 0.02, 0.95)
    assert found.sparsities[:, 0].max() == 0 and np.isfinite(found.errors).all()

    def only_half(alphas, thresholds):
        return np.where(alphas == 0.5, 0.0, np.inf).sum(axis=1)

    best, _ = search_exponents(only_half, IDENTITY, np.full(7, 0.5), np.full(7, 0.5), (0.0, 0.5, 1.0), 2)
    np.testing.assert_array_equal(best, 0.5)
