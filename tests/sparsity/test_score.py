import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from wisparse_jax.sparsity.score import channel_norms, channel_thresholds


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), alpha=st.sampled_from([0.0, 0.35, 1.0, 1.5]), share=st.floats(0.05, 0.95))
def test_thresholding_the_activation_is_thresholding_the_score(seed, alpha, share):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((20, 16)).astype(np.float32)
    weight = (rng.standard_normal((16, 8)) * rng.gamma(1.0, 1.0, (16, 1))).astype(np.float32)
    norms = np.linalg.norm(weight.astype(np.float64), axis=1)
    score = np.abs(x) * np.maximum(norms**alpha, 1e-4)
    threshold = np.quantile(score, share)
    thresholds = channel_thresholds(channel_norms(jnp.asarray(weight)), jnp.float32(alpha), jnp.float32(threshold))
    kept = np.abs(x) >= np.asarray(thresholds)
    clear = (
        np.abs(score - threshold) > 1e-5 * threshold
    )  # a score within float32 rounding of threshold may go either way
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(kept[clear], (score >= threshold)[clear])


def test_a_channel_of_zero_weights_is_scored_at_the_floor():
    thresholds = channel_thresholds(jnp.array([0.0, 2.0]), jnp.float32(1.0), jnp.float32(1.0))
    np.testing.assert_allclose(np.asarray(thresholds), [1e4, 0.5], rtol=1e-6)


def test_alpha_zero_ignores_the_weights():
    thresholds = channel_thresholds(jnp.array([0.0, 0.1, 7.0]), jnp.float32(0.0), jnp.float32(0.3))
    np.testing.assert_allclose(np.asarray(thresholds), [0.3] * 3, rtol=1e-6)
