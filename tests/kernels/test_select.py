from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels_pallas.select import select, select_attention, select_gated, select_norm
from wisparse_jax.testing import listed_channels, normal

EXAMPLES = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

XLA: dict[str, Any] = {"implementation": "xla"}


def expected_channels(x, thresholds):
    """What `listed_channels` finds in lists of them."""
    x = np.asarray(x.astype(jnp.float32))
    keeps = np.abs(x) >= np.asarray(thresholds)[:, None]
    return keeps.any(1), np.where(keeps, x, 0)


def assert_same(found, expected, tolerance=0.0):
    """Lists, and what they are to hold."""
    listed, values = listed_channels(found, expected[0].shape[1])
    np.testing.assert_array_equal(listed, expected[0])
    np.testing.assert_allclose(values, expected[1], rtol=tolerance, atol=tolerance)


@EXAMPLES
@given(
    size=st.sampled_from([1, 31, 64, 200]),
    batch=st.sampled_from([1, 2, 5]),
    layers=st.sampled_from([1, 3]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    seed=st.integers(0, 1000),
)
def test_lists_hold_exactly_the_kept_channels(triton, size, batch, layers, dtype, seed):
    x, thresholds = normal(seed, batch, size, dtype=dtype), jnp.abs(normal(seed + 1, layers, size))
    for how in (XLA, triton):
        assert_same(select(x, thresholds, 32, **how), expected_channels(x, thresholds))


@pytest.mark.parametrize("level", [0.0, jnp.inf])
def test_all_none_and_what_is_not_finite(triton, level):
    x = jnp.array([[1.0, -jnp.inf, jnp.nan, 0.0, 2.0]])
    listed, _ = listed_channels(select(x, jnp.full((1, 5), level), 8, **triton), 5)
    assert np.flatnonzero(listed).tolist() == ([0, 1, 3, 4] if level == 0 else [1])  # a NaN is above nothing


@EXAMPLES
@given(
    size=st.sampled_from([8, 48, 130]),
    batch=st.sampled_from([1, 3]),
    parts=st.sampled_from([None, 1, 4]),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_norm(triton, size, batch, parts, biased, seed):
    x = normal(seed, batch, size)
    product = None if parts is None else normal(seed + 1, parts, batch, size)
    bias = normal(seed + 2, size) if biased and parts else None
    weight, thresholds = normal(seed + 3, size), jnp.abs(normal(seed + 4, 2, size)) * 0.7
    arguments = (x, product, bias, weight, 1e-5, thresholds, 16)
    stream, lists = select_norm(*arguments, implementation="xla")
    expected = x + (0 if product is None else product.sum(0)) + (0 if bias is None else bias[None])
    np.testing.assert_allclose(stream, expected, rtol=1e-5, atol=1e-6)
    found, found_lists = select_norm(*arguments, **triton)
    np.testing.assert_allclose(found, stream, rtol=1e-5, atol=1e-6)
    assert_same(found_lists, listed_channels(lists, size), 1e-5)


@EXAMPLES
@given(size=st.sampled_from([8, 48, 130]), batch=st.sampled_from([1, 3]), biased=st.booleans(), seed=st.integers(0, 99))
def test_gate(triton, size, batch, biased, seed):
    gate, up, bias = normal(seed, 3, batch, size), normal(seed + 1, 3, batch, size), normal(seed + 2, size)
    thresholds = jnp.abs(normal(seed + 3, 1, size)) * 0.3
    arguments = (gate, up, bias if biased else None, None, thresholds, 32, jnp.float32)
    plain = jax.nn.silu(gate.sum(0) + (bias[None] if biased else 0)) * up.sum(0)
    for how in (XLA, triton):
        assert_same(select_gated(*arguments, **how), expected_channels(plain, thresholds), 1e-5)


@EXAMPLES
@given(heads=st.sampled_from([1, 4, 7]), splits=st.sampled_from([1, 4]), batch=st.sampled_from([1, 3]))
def test_merged_attention(triton, heads, splits, batch):
    """Softmax over all slots, put together from softmaxes over parts of them."""
    dim, slots = 16, 8
    scores, values = 3 * normal(0, batch, heads, splits, slots), normal(1, batch, heads, splits, slots, dim)
    whole = jax.nn.softmax(scores.reshape(batch, heads, -1))
    expected = jnp.einsum("bhs,bhsd->bhd", whole, values.reshape(batch, heads, -1, dim)).reshape(batch, -1)
    highest = scores.max(-1)
    weights = jnp.exp(scores - highest[..., None])
    partial = jnp.einsum("bhks,bhksd->bkhd", weights, values).reshape(batch, splits, -1)
    arguments = (partial, highest.swapaxes(1, 2), weights.sum(-1).swapaxes(1, 2))
    thresholds = jnp.full((1, heads * dim), 0.2)
    for how in (XLA, triton):
        lists = select_attention(*arguments, thresholds, 32, jnp.float32, **how)
        assert_same(lists, expected_channels(expected, thresholds), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_factors_are_of_each_sequences_thresholds(triton, dtype):
    """Exactly what each sequence gets alone with the thresholds times its factor; the lists are of all of them."""
    size, factors = 100, jnp.array([0.7, 1.0, 1.6], jnp.float32)
    x, parts, weight = normal(0, 3, size, dtype=dtype), normal(1, 2, 3, size), normal(2, size, dtype=dtype)
    limits = jnp.abs(normal(3, 2, size)).at[:, 3].set(jnp.inf).at[:, 5].set(0)
    ones = jnp.ones((3, 1, 4))
    selections = [
        lambda rows, limits, how: select(x[rows], limits, 32, **how),
        lambda rows, limits, how: select_norm(x[rows], None, None, weight, 1e-5, limits, 32, **how)[1],
        lambda rows, limits, how: select_gated(
            parts[:, rows], parts[:, rows], None, None, limits / 4, 32, dtype, **how
        ),
        lambda rows, limits, how: select_attention(
            parts.swapaxes(0, 1)[rows, :1], ones[rows], ones[rows], limits, 32, dtype, **how
        ),
    ]
    for how in (XLA, triton):
        for run in selections:
            listed, values = listed_channels(run(slice(None), limits, how | {"factors": factors}), size)
            alone = [listed_channels(run(slice(b, b + 1), limits * factors[b], how), size) for b in range(3)]
            np.testing.assert_array_equal(listed, np.any([kept for kept, _ in alone], axis=0))
            np.testing.assert_array_equal(values, np.concatenate([own for _, own in alone], axis=1))
            assert len({own.sum() for own, _ in alone}) == 3
