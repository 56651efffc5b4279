"""Nested planes as arrays: how far off each of them leaves a weight, and products that read some of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from kernels_pallas import sparse_linear
from kernels_pallas.formats import FORMATS, format_of
from kernels_pallas.select import select
from kernels_pallas.sparse_linear.reference import dot, keep_mask, read_share
from kernels_pallas.sparse_product import Config, sparse_product
from kernels_pallas.weight import Weight
from wisparse_jax.models.quantise import rounded
from wisparse_jax.testing import normal, relative_error

CUTS = {"int4+2+2": (4, 2, 2), "int4+4": (4, 4), "int2+2+2+2": (2, 2, 2, 2)}
ALONE = {"int2+2+2+2": 0.9}  # what the first plane counts where it is the only one that is read
every_cut = pytest.mark.parametrize("kind", CUTS)


def fields(weight, kind):
    """Of each plane `[in, out]`, bit by bit from the bytes."""
    out = []
    for plane, bits in zip(weight.values, CUTS[kind], strict=True):
        ones = np.unpackbits(np.asarray(plane)[:, :, None], axis=-1, bitorder="little")
        out.append(ones.reshape(len(ones), -1, bits) @ 2 ** np.arange(bits))
    return out


def written_out(weight, kind):
    """The term of each plane, in float64."""
    scales = np.asarray(weight.scales, np.float64).T.repeat(128, axis=1)[:, : weight.shape[1]]
    terms, read = [], 0
    for field, bits in zip(fields(weight, kind), CUTS[kind], strict=True):
        read += bits
        # The middle of the cell in the range of the plane above, of which there are 2^bits.
        middle = 2.0 ** (CUTS[kind][0] - read + bits - 1)
        terms.append(scales * ((field + 0.5) * 2.0 ** (CUTS[kind][0] - read) - middle))
    return terms


def kernel(size_in=24, size_out=300):
    made = np.array(normal(0, size_in, size_out) * jnp.geomspace(1e-3, 1e3, size_in)[:, None])
    made[3] = 0
    made[5, 7] = 40 * made[5].max()
    return made


@every_cut
def test_each_plane_halves_what_is_left_as_often_as_it_has_bits(kind):
    """No weight is off by more than half a cell, the largest of its group included; the scale is hardly above it."""
    own, weight = kernel(), rounded(jnp.asarray(kernel()), kind)
    assert weight.kind == kind and weight.shape == own.shape and weight.format.planes == CUTS[kind]
    scales = np.asarray(weight.scales, np.float64).T
    first = CUTS[kind][0]
    padded = np.pad(np.abs(own), [(0, 0), (0, 84)]).reshape(24, 3, 128).max(-1) / 2 ** (first - 1)
    real = padded > 0
    assert (scales[real] >= padded[real]).all() and (scales[real] <= padded[real] * (1 + 2**-7)).all()
    steps, total, read = scales.repeat(128, axis=1)[:, :300], np.zeros(own.shape), 0
    for term, bits in zip(written_out(weight, kind), CUTS[kind], strict=True):
        total, read = total + term, read + bits
        off = np.abs(total - own)
        limit = steps * 2.0 ** (first - read) / 2
        assert (off <= limit * (1 + 1e-5)).all()
        assert off.max(axis=1)[own.any(1)].min() > 0 and (off > 0.9 * limit).any()
    np.testing.assert_array_equal(weight.wide(), total.astype(np.float32))
    assert np.abs(np.asarray(weight.wide())[3]).max() < 1e-30


@every_cut
def test_planes_are_the_terms_of_their_bytes(kind):
    weight = rounded(jnp.asarray(kernel()), kind)
    for found, expected in zip(weight.wide_planes(), written_out(weight, kind), strict=True):
        np.testing.assert_array_equal(found, expected.astype(np.float32))
    assert [plane.shape[1] * 8 for plane in weight.values] == [300 * bits for bits in CUTS[kind]]
    assert weight.nbytes == 24 * 300 + 2 * 24 * 3


@every_cut
def test_a_weight_is_known_by_its_values(kind):
    weight = rounded(jnp.asarray(kernel()), kind)
    assert format_of(weight.values).name == Weight.of(weight.layer).kind == kind
    assert format_of(jax.eval_shape(lambda w: w.values, weight)).name == kind
    with pytest.raises(ValueError, match=r"weight: expected one of the formats float32, .*int4"):
        format_of(weight.values[1:] + weight.values[:1] * 4)


@pytest.mark.parametrize(("kind", "columns"), [("int4+2+2", 4), ("int4+4", 2)])
def test_columns_fill_bytes(kind, columns):
    assert FORMATS[kind].problem(3 * columns) is None
    assert FORMATS[kind].problem(columns // 2) == f"expected columns in multiples of {columns}, found {columns // 2}"


def nested(kind, size, seed):
    """Thresholds of which some keep everything, some nothing, ascending along the planes."""
    rng = np.random.default_rng(seed)
    limits = rng.exponential(0.8, (len(CUTS[kind]), size)) * (rng.random(size) < 0.8)
    limits[:, rng.random(size) < 0.1] = np.inf
    return np.sort(limits, axis=0).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([1, 3]), size_in=st.sampled_from([5, 40]), seed=st.integers(0, 10_000),
    kind=st.sampled_from(list(CUTS)),
)  # fmt: skip
def test_the_product_reads_of_each_channel_the_planes_it_asks_for(rows, size_in, seed, kind):
    """Channel by channel in float64."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, size_in)).astype(np.float32)
    weight = rounded(jnp.asarray(rng.standard_normal((size_in, 160)).astype(np.float32)), kind)
    limits, terms = nested(kind, size_in, seed), written_out(weight, kind)
    expected = np.zeros((rows, 160))
    for r, i in np.ndindex(rows, size_in):
        planes = sum(abs(x[r, i]) >= limits[:, i])
        counts = ALONE.get(kind, 1) if planes == 1 else 1
        expected[r] += counts * x[r, i] * sum((term[i] for term in terms[:planes]), np.zeros(160))
    found = sparse_linear(jnp.asarray(x), weight, jnp.asarray(limits))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@every_cut
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_none_and_one_kept(kind, dtype):
    x, weight = normal(0, 3, 96, dtype=dtype), rounded(normal(1, 96, 160), kind)
    planes = len(CUTS[kind])
    tolerance = 1e-6 if dtype == jnp.float32 else 4e-3
    whole = sparse_linear(x, weight, jnp.zeros((planes, 96)))
    assert whole.dtype == dtype and relative_error(whole, dot(x, weight)) < tolerance
    assert not np.asarray(sparse_linear(x, weight, jnp.full((planes, 96), jnp.inf)), np.float32).any()
    # One channel, and of that one plane alone.
    one = jnp.full((planes, 96), jnp.inf).at[0, 37].set(0)
    expected = ALONE.get(kind, 1) * np.outer(np.asarray(x, np.float64)[:, 37], written_out(weight, kind)[0][37])
    assert relative_error(sparse_linear(x, weight, one), expected) < tolerance


def test_thresholds_without_planes_skip_whole_channels():
    x, weight = normal(0, 2, 96), rounded(normal(1, 96, 160), "int4+2+2")
    limits = jnp.abs(normal(2, 96))
    expected = np.where(np.abs(x) >= np.asarray(limits), x, 0) @ np.asarray(weight.wide())
    np.testing.assert_allclose(sparse_linear(x, weight, limits), expected, rtol=1e-4, atol=1e-4)


def test_what_is_read_is_counted_in_bits():
    x, weight = jnp.asarray([[1.0, -2.0, 3.0, 4.0], [0.0, 0.0, 0.0, jnp.nan]]), rounded(normal(1, 4, 8), "int4+2+2")
    limits = jnp.asarray([[0.5] * 4, [1.5] * 4, [3.5] * 4])
    np.testing.assert_array_equal(keep_mask(x, limits).sum(-1), [[4, 3, 1], [0, 0, 0]])
    np.testing.assert_allclose(read_share(x, weight, limits), [(4 * 4.125 + 3 * 2 + 1 * 2) / (4 * 8.125), 0])
    np.testing.assert_allclose(read_share(x, weight, limits[1]), [0.75, 0])


def test_other_thresholds_are_refused():
    x, weight = normal(0, 2, 96), rounded(normal(1, 96, 160), "int4+2+2")
    with pytest.raises(ValueError, match=r"expected \[3, in\] for int4\+2\+2 weights, found \(2, 96\)"):
        sparse_linear(x, weight, jnp.zeros((2, 96)))
    with pytest.raises(ValueError, match=r"expected \[1, in\] for float32"):
        sparse_linear(x, normal(1, 96, 160), jnp.zeros((2, 96)))
    kept = select(x, jnp.zeros((2, 96)), CONFIG.rows, implementation="xla")
    with pytest.raises(ValueError, match="one list of channels for each of 3 planes of 1 weights"):
        sparse_product(kept, [weight], config=CONFIG, implementation="xla")


CONFIG = Config(rows=32, lists=2, block_rows=16, block_columns=128, warps=4)


@every_cut
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_multiplies_the_listed_rows_of_each_plane(triton, kind, batch, dtype):
    """Two layers, one narrower than a group of columns, one of two groups and a part; all, none and one kept too."""
    weights = [rounded(normal(i, 100, n), kind) for i, n in enumerate((40, 300))]
    x, planes = normal(7, batch, 100, dtype=dtype), len(CUTS[kind])
    some = jnp.concatenate([jnp.asarray(nested(kind, 100, seed)) for seed in (0, 1)])
    one = jnp.full_like(some, jnp.inf).at[planes - 1, 37].set(0)
    product = jax.jit(functools.partial(sparse_product, config=CONFIG, **triton))
    for limits in (some, jnp.zeros_like(some), jnp.full_like(some, jnp.inf), one):
        kept = select(x, limits, CONFIG.rows, implementation="xla")
        found = product(kept, weights)
        for layer, weight in enumerate(weights):
            own, terms = np.asarray(limits[layer * planes :][:planes]), written_out(weight, kind)
            numbers = np.asarray(x.astype(jnp.float32), np.float64)
            expected = sum(np.where(np.abs(numbers) >= own[k], numbers, 0) @ terms[k] for k in range(planes))
            largest = max(np.abs(expected).max(), 1e-30)
            # Of several sequences a tensor core multiplies the terms in the activations' dtype.
            tolerance = 1e-5 if dtype == jnp.float32 or batch == 1 else 5e-3
            assert np.abs(np.asarray(found[layer].sum(0)) - expected).max() <= tolerance * largest


@every_cut
def test_the_kernels_are_the_masked_product(triton, kind):
    x, weight = normal(0, 2, 96), rounded(normal(1, 96, 160), kind)
    for limits in (jnp.asarray(nested(kind, 96, 3)), jnp.abs(normal(2, 96))):
        found = sparse_linear(x, weight, limits, **triton)
        assert relative_error(found, sparse_linear(x, weight, limits, implementation="xla")) < 1e-5


@every_cut
@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_the_masked_products_lower_for_every_platform(kind, platform):
    """One for each plane."""
    shapes = jax.eval_shape(functools.partial(rounded, kind=kind), jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16))
    x, limits = jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16), (len(CUTS[kind]), 4096)
    fallback = jax.jit(functools.partial(sparse_linear, implementation="xla"))
    lowered = export.export(fallback, platforms=[platform])(x, shapes, jax.ShapeDtypeStruct(limits, jnp.float32))
    assert lowered.mlir_module().count("stablehlo.dot_general") == len(CUTS[kind])
