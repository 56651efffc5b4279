import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wisparse_jax.calibration.statistics import GROUP_OF, STEPS, BlockStatistics, spaced_tokens, threshold_between
from wisparse_jax.models.config import INPUT_GROUPS, LAYERS


@pytest.fixture(scope="module")
def statistics():
    rng = np.random.default_rng(0)
    sizes = dict(zip(INPUT_GROUPS, (16, 24, 16, 40), strict=True))
    samples = {g: np.abs(rng.standard_normal((50, n))).astype(np.float32) for g, n in sizes.items()}
    norms = {name: rng.gamma(2.0, 1.0, sizes[GROUP_OF[name]]).astype(np.float32) for name in LAYERS}
    return BlockStatistics(*jax.tree.map(jnp.asarray, (samples, norms)))


@settings(max_examples=60, deadline=None)
@given(layer=st.sampled_from(LAYERS), alpha=st.sampled_from([0.0, 0.5, 1.3]), sparsity=st.floats(0, 1))
def test_the_threshold_skips_its_share_of_the_scores(statistics, layer, alpha, sparsity):
    threshold = statistics.threshold(layer, alpha, sparsity)
    gains = np.asarray(statistics.gains[layer])
    scores = np.asarray(statistics.samples[GROUP_OF[layer]]) * np.maximum(gains ** np.float32(alpha), 1e-4)
    skipped = (scores < np.float32(threshold)).mean()
    # Between two steps of the table it is interpolated.
    assert abs(skipped - sparsity) <= 1 / scores.size + 1 / STEPS + 1e-9


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


between = jax.jit(threshold_between)
# Few distinct values, so that many tie; zeros among them.
SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]) | st.floats(0, 8, width=32), min_size=12, max_size=12)


@settings(max_examples=300, deadline=None)
@given(scores=SCORES, sparsity=st.floats(0, 1, width=32))
def test_a_threshold_lies_between_scores_and_skips_the_share_that_it_says(scores, sparsity):
    values = np.asarray(scores, np.float32)
    values[values < 1e-30] = 0  # XLA's CPU programs take denormal numbers for 0
    threshold, share = (float(a) for a in between(jnp.asarray(values), jnp.float32(sparsity)))
    assert np.isfinite(threshold) and (values < threshold).mean() == pytest.approx(share, abs=1e-7)
    below, above = values[values < threshold], values[values >= threshold]
    if len(below) and len(above) and np.nextafter(below.max(), np.float32(np.inf)) < above.min():
        assert below.max() < threshold < above.min()
    # No other set of whole ties comes closer to what was asked, but for zeros, which cost nothing to skip.
    wanted = round(float(np.float32(sparsity) * np.float32(len(values))))
    possible = {int((values < v).sum()) for v in values} | {len(values)}
    nearest = min(abs(n - wanted) for n in possible)
    if wanted and not (values == 0).sum() >= wanted:
        assert abs(round(share * len(values)) - wanted) == nearest


def test_no_sparsity_skips_nothing_and_all_of_it_everything():
    scores = jnp.asarray([0.0, 0.0, 1.0, 2.0])
    assert [float(a) for a in between(scores, jnp.float32(0))] == [0.0, 0.0]
    threshold, share = between(scores, jnp.float32(1))
    assert float(share) == 1 and 2 < float(threshold) < np.inf


def test_scores_that_are_all_equal_are_skipped_together_or_not_at_all():
    ones = jnp.ones(10)
    assert [float(between(ones, jnp.float32(p))[1]) for p in (0.4, 0.6)] == [0.0, 1.0]
    assert float(between(jnp.zeros(10), jnp.float32(0.1))[1]) == 1.0


def test_zeros_beyond_the_share_are_skipped_too():
    threshold, share = between(jnp.asarray([0.0] * 7 + [1.0, 2.0, 3.0]), jnp.float32(0.5))
    assert float(share) == pytest.approx(0.7) and 0 < float(threshold) < 1


def test_scores_that_differ_in_their_last_bit_are_told_apart():
    scores = np.asarray([1.0], np.float32)
    for _ in range(11):
        scores = np.append(scores, np.nextafter(scores[-1], np.float32(2)))
    for count in range(1, 12):
        threshold, share = (np.float32(a) for a in between(jnp.asarray(scores), jnp.float32(count / 12)))
        assert (scores < threshold).sum() == count and abs(share - count / 12) < 1e-7


def test_of_two_equal_scores_half_is_both():
    assert float(between(jnp.ones(2), jnp.float32(0.5))[1]) == 1.0


def test_the_least_sparsity_has_a_threshold(statistics):
    assert 0 < statistics.threshold("q", 0.0, 0.5 / STEPS) < statistics.threshold("q", 0.0, 0.01)


@pytest.mark.parametrize(
    ("tokens", "channels", "every"),
    [(1_000, 64, 1), (4096, 1024, 4), (2048, 4096, 2), (16_384, 1024, 16), (1_000, 2**20, 1), (4096, 257, 2)],
)
def test_tokens_are_left_out_where_there_are_too_many_scores_to_sort(tokens, channels, every):
    assert spaced_tokens(tokens, channels) == slice(None, None, every)
