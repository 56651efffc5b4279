import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from kernels_pallas import sparse_linear

SIZES = st.sampled_from([1, 2, 7, 16, 33])


def expected_product(x, weight, thresholds):
    """Channel by channel, in float64."""
    expected = np.zeros((len(x), weight.shape[1]))
    for r in range(len(x)):
        kept = [i for i in range(len(weight)) if abs(x[r, i]) >= thresholds[i]]
        expected[r] = x[r, kept].astype(np.float64) @ weight[kept].astype(np.float64)
    return expected


def problem(rows, size_in, size_out, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, size_in)).astype(np.float32)
    weight = rng.standard_normal((size_in, size_out)).astype(np.float32)
    return x, weight, rng.uniform(0, 1.5, size_in).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(rows=SIZES, size_in=SIZES, size_out=SIZES, seed=st.integers(0, 10_000))
def test_product_of_the_kept_channels(rows, size_in, size_out, seed):
    x, weight, thresholds = problem(rows, size_in, size_out, seed)
    expected = expected_product(x, weight, thresholds)
    found = sparse_linear(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(thresholds))
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 100, 70), (3, 33, 130), (16, 200, 16)])
def test_the_kernels_give_the_same_product(triton, sizes):
    x, weight, thresholds = problem(*sizes, seed=0)
    found = sparse_linear(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(thresholds), **triton)
    np.testing.assert_allclose(np.asarray(found), expected_product(x, weight, thresholds), rtol=1e-5, atol=1e-4)


def test_more_rows_than_the_kernels_take(triton):
    x, weight, thresholds = (jnp.asarray(a) for a in problem(17, 20, 30, seed=0))
    with pytest.raises(ValueError, match="at most 16 rows, found 17"):
        sparse_linear(x, weight, thresholds, **triton)
    np.testing.assert_array_equal(
        sparse_linear(x, weight, thresholds), sparse_linear(x, weight, thresholds, implementation="xla")
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_all_kept_is_the_dense_product_and_none_kept_is_zero(dtype):
    x = jax.random.normal(jax.random.key(0), (3, 5, 24), dtype)
    weight = jax.random.normal(jax.random.key(1), (24, 10), dtype)
    dense = sparse_linear(x, weight, jnp.zeros(24))
    assert dense.dtype == dtype
    np.testing.assert_array_equal(dense, jnp.matmul(x, weight, precision="highest"))
    assert not np.asarray(sparse_linear(x, weight, jnp.full(24, 1e9)), np.float32).any()


def test_infinities_are_kept_and_nans_are_not():
    weight = jnp.ones((2, 3))
    assert np.isinf(sparse_linear(jnp.array([jnp.inf, 1.0]), weight, jnp.full(2, 5.0))).all()
    np.testing.assert_array_equal(sparse_linear(jnp.array([jnp.nan, 1.0]), weight, jnp.full(2, 0.5)), 1.0)


def test_an_implementation_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="implementation = 'cuda'"):
        sparse_linear(jnp.ones(2), jnp.ones((2, 2)), jnp.ones(2), implementation="cuda")


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_the_fallback_lowers_for_every_platform(platform):
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, 4096), (4096, 1024))]
    fallback = jax.jit(functools.partial(sparse_linear, implementation="xla"))
    lowered = export.export(fallback, platforms=[platform])(*shapes, jax.ShapeDtypeStruct((4096,), jnp.float32))
    assert "dot_general" in lowered.mlir_module()
