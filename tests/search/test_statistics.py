import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wisparse_jax.models.config import INPUT_GROUPS, LAYERS
from wisparse_jax.search.statistics import GROUP_OF, BlockStatistics


@pytest.fixture(scope="module")
def statistics():
    rng = np.random.default_rng(0)
    sizes = dict(zip(INPUT_GROUPS, (16, 24, 16, 40), strict=True))
    samples = {g: np.abs(rng.standard_normal((50, n))).astype(np.float32) for g, n in sizes.items()}
    norms = {name: rng.gamma(2.0, 1.0, sizes[GROUP_OF[name]]).astype(np.float32) for name in LAYERS}
    return BlockStatistics(samples, norms)


@settings(max_examples=60, deadline=None)
@given(layer=st.sampled_from(LAYERS), alpha=st.sampled_from([0.0, 0.5, 1.3]), sparsity=st.floats(0, 1))
def test_the_threshold_skips_exactly_its_share_of_the_scores(statistics, layer, alpha, sparsity):
    tau = statistics.threshold(layer, alpha, sparsity)
    scores = statistics.samples[GROUP_OF[layer]] * np.maximum(statistics.norms[layer] ** np.float32(alpha), 1e-4)
    skipped = (scores < np.float32(tau)).mean()
    assert abs(skipped - sparsity) <= 1.0 / scores.size + 1e-9


def test_zero_sparsity_keeps_all(statistics):
    assert statistics.threshold("q", 0.3, 0.0) == 0.0


def test_a_sparsity_outside_the_unit_interval_is_refused(statistics):
    with pytest.raises(ValueError, match=r"sparsity 1\.01 is outside"):
        statistics.threshold("q", 0.0, 1.01)


def test_many_candidates_at_once_are_the_single_ones(statistics):
    grid = np.random.default_rng(1).uniform(0, 0.9, (3, 7))
    alphas = np.linspace(0, 1.5, 7)
    rows = np.stack([statistics.thresholds(alphas, row) for row in grid])
    np.testing.assert_array_equal(statistics.thresholds(alphas, grid), rows)
