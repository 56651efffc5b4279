import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels_pallas.select import select
from kernels_pallas.sparse_product import Config, config_for, sparse_product
from kernels_pallas.sparse_product.config import heuristic, search_space, shape_key, valid
from kernels_pallas.weight import as_weight
from wisparse_jax.models.quantise import rounded
from wisparse_jax.testing import normal

EXAMPLES = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CONFIG = Config(rows=32, lists=2, block_rows=16, block_columns=32, warps=4)
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-3, jnp.float16: 1e-3}

XLA: dict[str, Any] = {"implementation": "xla"}


def exact(x, thresholds, weights):
    """Each row's own mask's product, in float64."""
    x = np.asarray(x.astype(jnp.float32), np.float64)
    out = []
    for layer, weight in enumerate(weights):
        masked = np.where(np.abs(x) >= np.asarray(thresholds[layer]), x, 0)
        out.append(masked @ np.asarray(as_weight(weight).wide(), np.float64))
    return out


def assert_close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        one = np.asarray(one.sum(0))
        assert np.abs(one - other).max() <= tolerance * max(np.abs(other).max(), 1e-30)


@EXAMPLES
@given(
    size=st.sampled_from([16, 100, 200]),
    outs=st.sampled_from([(32,), (40, 7), (33, 64, 5)]),
    batch=st.sampled_from([1, 2, 16]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    seed=st.integers(0, 1000),
)
def test_product(triton, size, outs, batch, dtype, seed):
    x, thresholds = normal(seed, batch, size, dtype=dtype), jnp.abs(normal(seed + 1, len(outs), size))
    weights = [normal(seed + 2 + i, size, n, dtype=dtype) for i, n in enumerate(outs)]
    kept = select(x, thresholds, CONFIG.rows, implementation="xla")
    expected = exact(x, thresholds, weights)
    for how in (XLA, triton):
        assert_close(sparse_product(kept, weights, config=CONFIG, **how), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_integers_with_scales(triton, batch, dtype, kind):
    """Columns of two scales, and of a part of one."""
    weights = [rounded(normal(i, 100, n), kind) for i, n in enumerate((40, 200))]
    x, thresholds = normal(7, batch, 100, dtype=dtype), jnp.abs(normal(8, 2, 100))
    kept = select(x, thresholds, CONFIG.rows, implementation="xla")
    for how in (XLA, triton):
        found = sparse_product(kept, weights, config=CONFIG, **how)
        assert_close(found, exact(x, thresholds, weights), TOLERANCE[dtype])


@pytest.mark.parametrize("batch", [1, 4])
def test_all_kept_none_kept_one_kept(triton, batch):
    x, weights = normal(0, batch, 100), [normal(1, 100, 40)]
    one = jnp.full((1, 100), jnp.inf).at[0, 37].set(0)
    for thresholds in (jnp.zeros((1, 100)), jnp.full((1, 100), jnp.inf), one):
        kept = select(x, thresholds, CONFIG.rows, implementation="xla")
        found = sparse_product(kept, weights, config=CONFIG, **triton)
        assert_close(found, exact(x, thresholds, weights), 1e-5)


def test_infinities_and_nans_come_out_as_in_the_masked_product(triton):
    weights, thresholds = [normal(1, 5, 40)], jnp.full((1, 5), 0.5)
    x = jnp.array([[1.0, jnp.inf, 2.0, 0.1, 3.0], [1.0, 2.0, jnp.nan, 0.1, 3.0]])
    kept = select(x, thresholds, CONFIG.rows, implementation="xla")
    found = np.asarray(sparse_product(kept, weights, config=CONFIG, **triton)[0].sum(0))
    assert np.isinf(found[0]).all()
    np.testing.assert_allclose(found[1], np.array([1.0, 2.0, 0, 0, 3.0]) @ np.asarray(weights[0]), rtol=1e-5)


def test_a_row_is_its_own_masks_product_whatever_its_neighbours_keep(triton):
    weights, thresholds = [normal(1, 100, 40)], jnp.full((1, 100), 0.7)
    x = normal(0, 4, 100)
    other = x.at[1:].set(10 * normal(9, 3, 100))
    results = []
    for rows in (x, other):
        kept = select(rows, thresholds, CONFIG.rows, implementation="xla")
        results.append(np.asarray(sparse_product(kept, weights, config=CONFIG, **triton)[0].sum(0)[0]))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_lists_that_do_not_fit_are_refused(triton):
    kept = select(normal(0, 1, 100), jnp.zeros((1, 100)), 32, implementation="xla")
    with pytest.raises(ValueError, match="one list of channels for each of 2 weights"):
        sparse_product(kept, [normal(1, 100, 8)] * 2, **triton)
    with pytest.raises(ValueError, match="at most 128 rows"):
        sparse_product(kept, [normal(1, 200, 8)], **triton)
    other = dataclasses.replace(CONFIG, rows=64)
    with pytest.raises(ValueError, match="chunks of 32 channels; the configuration expects 64"):
        sparse_product(kept, [normal(1, 100, 8)], config=other, **triton)
    small = dataclasses.replace(CONFIG, block_rows=1)
    with pytest.raises(ValueError, match="does not fit a batch of 1 with float32 weights"):
        sparse_product(kept, [normal(1, 100, 8)], config=small, **triton)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU can run it")
def test_a_kernel_that_cannot_run_here_is_refused():
    kept = select(normal(0, 1, 100), jnp.zeros((1, 100)), 32)
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU; the default device is 'cpu'"):
        sparse_product(kept, [normal(1, 100, 8)], implementation="triton")


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(1, 30_000),
    outs=st.lists(st.integers(1, 30_000), min_size=1, max_size=3),
    batch=st.integers(1, 16),
    kind=st.sampled_from(["int4", "int8", "bfloat16", "float32"]),
)
def test_the_heuristic_always_answers(size, outs, batch, kind):
    config = heuristic(size, tuple(outs), batch, kind)
    for value in (config.rows, config.block_rows, config.block_columns):
        assert value & (value - 1) == 0
    assert valid(config, batch, kind)
    assert config == config_for(size, tuple(outs), batch, kind, device="a device without tuned values")


def test_the_search_space_holds_what_kernels_accept():
    for batch, kind in ((1, "bfloat16"), (8, "bfloat16"), (1, "int4")):
        configs = list(search_space(4096, (4096,), batch, kind))
        assert len(configs) > 20 and len(set(configs)) == len(configs)
        assert all(valid(c, batch, kind) for c in configs)
    assert shape_key(4096, (14336, 14336), 1, "bfloat16") == "4096x14336+14336 batch 1 bfloat16"
