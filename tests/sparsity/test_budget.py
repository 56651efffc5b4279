import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wisparse_jax.sparsity.budget import project_to_mean


@settings(max_examples=200, deadline=None)
@given(
    moves=st.lists(st.floats(-3, 3), min_size=1, max_size=40),
    target=st.floats(0.0, 0.95),
    seed=st.integers(0, 100),
)
def test_projection_meets_the_budget_exactly_within_bounds(moves, target, seed):
    weights = np.random.default_rng(seed).uniform(1, 1e6, len(moves))
    out = project_to_mean(target + np.array(moves), weights, target, 0.0, 0.95)
    assert abs(out @ weights / weights.sum() - target) < 1e-12
    assert out.min() >= 0 and out.max() <= 0.95


def test_projection_keeps_what_already_fits():
    values = np.array([0.4, 0.6, 0.5])
    np.testing.assert_allclose(project_to_mean(values, np.ones(3), 0.5), values, atol=1e-12)


def test_bounds_are_those_of_a_share_unless_others_are_given_and_may_be_met_everywhere():
    np.testing.assert_allclose(project_to_mean(np.array([-3.0, 3.0]), np.ones(2), 0.5), [0, 1])
    np.testing.assert_allclose(project_to_mean(np.array([0.1, 0.7]), np.ones(2), 0.95, 0.0, 0.95), 0.95, rtol=1e-12)
    np.testing.assert_array_equal(project_to_mean(np.array([0.1, 0.7]), np.ones(2), 0.0), 0.0)
    with pytest.raises(ValueError, match=r"target sparsity 1.5 is outside the bounds \[0.0, 1.0\]"):
        project_to_mean(np.zeros(2), np.ones(2), 1.5)


def test_projection_refuses_what_cannot_be_met():
    with pytest.raises(ValueError, match="outside the bounds"):
        project_to_mean(np.zeros(3), np.ones(3), 0.97, 0.0, 0.95)
    with pytest.raises(ValueError, match="not finite"):
        project_to_mean(np.array([0.1, np.nan]), np.ones(2), 0.5)
