"""The Mosaic product: lowered everywhere, run where there is a GPU that can (it has no interpret mode)."""

import dataclasses
import functools
import json
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.implementation import mosaic_problem
from kernels_pallas.select import select
from kernels_pallas.sparse_product import Config, Ring, config_for, sparse_product
from kernels_pallas.sparse_product.config import heuristic_ring, ring_problem, ring_space, valid
from wisparse_jax.models.config import INPUT_GROUPS, read_config
from wisparse_jax.models.decode import product_configs
from wisparse_jax.models.llama import param_shapes
from wisparse_jax.models.quantise import quantise_params
from wisparse_jax.testing import lower_for_gpu
from wisparse_jax.testing.lowering import MOSAIC_CALL

RING = Ring(rows=64, lists=2, block_columns=256, group=8, slots=4)
RINGS = [RING, Ring(64, 1, 512, 4, 5), Ring(128, 4, 1024, 8, 4), Ring(64, 8, 256, 16, 6)]
runs = pytest.mark.skipif(
    jax.default_backend() != "gpu" or mosaic_problem() is not None, reason="needs a Hopper GPU and jax 0.11"
)


@pytest.fixture
def mosaic():
    pytest.importorskip("kernels_pallas.sparse_product.mosaic", reason="needs jax 0.11", exc_type=ImportError)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b", "llama-3-70b", "qwen2.5-7b", "qwen3-8b"])
def test_products_lower(repository, mosaic, name, dtype):
    config = read_config(repository / f"configs/{name}.json")
    for layers in INPUT_GROUPS.values():
        size_in, sizes = config.layer_shapes[layers[0]][0], tuple(config.layer_shapes[n][1] for n in layers)
        ring = next(ring_space(size_in, sizes, dtype))
        x = jax.ShapeDtypeStruct((1, size_in), jnp.bfloat16)
        thresholds = jax.ShapeDtypeStruct((len(sizes), size_in), jnp.float32)
        kept = jax.eval_shape(functools.partial(select, rows=ring.rows, implementation="xla"), x, thresholds)
        weights = [jax.ShapeDtypeStruct((size_in, n), dtype) for n in sizes]
        scales = [jax.ShapeDtypeStruct((n,), jnp.float32) if dtype == "int8" else None for n in sizes]
        product = functools.partial(sparse_product, config=ring, implementation="mosaic")
        text = lower_for_gpu(product, kept, weights, scales)
        assert text.count(f"@{MOSAIC_CALL}") == 1


def test_what_it_cannot_run_is_refused():
    assert ring_problem(RING, (512, 256), 1, jnp.bfloat16) is None
    for changes, sizes, batch, dtype, reason in [
        ({}, (256,), 2, "bfloat16", "takes one sequence and bfloat16 or int8 weights, found 2 and bfloat16"),
        ({}, (256,), 1, "float32", "found 1 and float32"),
        ({}, (256, 100), 1, "bfloat16", "256 or 512 or 1024 for bfloat16, a divisor of [256, 100]"),
        ({}, (256,), 1, "int8", "512 or 1024 or 2048 for int8"),
        ({"slots": 99}, (256,), 1, "bfloat16", "bytes of shared memory"),
        ({"slots": 3}, (256,), 1, "bfloat16", "4 to 128 slots"),
    ]:
        assert reason in str(ring_problem(dataclasses.replace(RING, **changes), sizes, batch, dtype))
    assert "takes activations in bfloat16, found float32" in str(ring_problem(RING, (512,), 1, "int8", "float32"))
    kept = select(jnp.ones((1, 128)), jnp.zeros((1, 128)), 64, implementation="xla")
    if mosaic_problem() is not None:
        with pytest.raises(ValueError, match="implementation = 'mosaic' needs"):
            sparse_product(kept, [jnp.ones((128, 256))], config=RING, implementation="mosaic")
    with pytest.raises(ValueError, match="Triton takes a Config, Mosaic a Ring"):
        sparse_product(kept, [jnp.ones((128, 256))], config=RING, implementation="triton", interpret=True)


def test_float32_activations_never_take_it(repository):
    """Not even over int8 weights, whose own dtype would allow it."""
    config = read_config(repository / "configs/llama-3.1-8b.json")
    for dtype, kind in (("bfloat16", Ring), ("float32", Config)):
        params = jax.eval_shape(quantise_params, param_shapes(config, dtype))
        assert {type(c) for c in product_configs(config, params, 1, mosaic=True).values()} == {kind}


def test_tuned_values_are_ones_that_run():
    for file in (resources.files("kernels_pallas") / "tuned").iterdir():
        if not file.name.endswith(".json"):
            continue
        tuned = json.loads(file.read_text())
        assert tuned["triton"]
        for key, fields in tuned["triton"].items():
            assert valid(Config(**fields), int(key.split()[2]))
        for key, fields in tuned["mosaic"].items():
            shape, _, batch, _, width = key.split()
            size_in, sizes = shape.split("x")
            sizes = tuple(int(n) for n in sizes.split("+"))
            dtype = {"1": "int8", "2": "bfloat16"}[width]
            assert batch == "1" and ring_problem(Ring(**fields), sizes, 1, dtype) is None
            found = functools.partial(config_for, int(size_in), sizes, 1, device=tuned["device"])
            assert found(dtype, mosaic=True) == Ring(**fields) and isinstance(found(dtype), Config)
            assert isinstance(found("float16", mosaic=True), Config)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_heuristic_gives_rings_that_run_or_none(dtype):
    some = 0
    for size_in in (256, 2048, 4096, 18944):
        for sizes in ((512, 128, 128), (4096,), (18944, 18944)):
            ring = heuristic_ring(size_in, sizes, dtype)
            some += ring is not None
            assert ring is None or ring_problem(ring, sizes, 1, dtype) is None
    assert some >= 3


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        one, other = np.asarray(one.sum(0)), np.asarray(other.sum(0))
        real = np.isfinite(other)
        assert (np.isfinite(one) == real).all()
        one, other = one[real], other[real]
        assert np.abs(one - other).max(initial=0) <= 1e-3 * max(np.abs(other).max(initial=0), 1e-30)


@runs
@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize(("size", "outs"), [(640, (1024, 2048)), (1000, (1024,)), (64, (3072, 1024, 1024))])
def test_product(ring, size, outs):
    """Half, all, none and one of the channels kept, and an infinite input."""
    x = jax.random.normal(jax.random.key(0), (1, size)).astype(jnp.bfloat16)
    thresholds = jnp.abs(jax.random.normal(jax.random.key(1), (len(outs), size)))
    weights = [jax.random.normal(jax.random.key(2 + i), (size, n), jnp.bfloat16) for i, n in enumerate(outs)]
    none = jnp.full_like(thresholds, jnp.inf)
    cases = [(x, t) for t in (thresholds, 0 * thresholds, none, none.at[:, 37].set(0))]
    for values, limits in [*cases, (x.at[0, 5].set(jnp.inf), thresholds)]:
        kept = select(values, limits, ring.rows)
        found = sparse_product(kept, weights, config=ring, implementation="mosaic")
        assert_close(found, sparse_product(kept, weights, implementation="xla"))


@runs
@pytest.mark.parametrize("ring", [Ring(64, 2, 512, 8, 4), Ring(128, 4, 1024, 8, 6), Ring(64, 1, 2048, 16, 4)])
def test_int8(ring):
    x = jax.random.normal(jax.random.key(0), (1, 600)).astype(jnp.bfloat16)
    thresholds, outs = jnp.abs(jax.random.normal(jax.random.key(1), (2, 600))), (2048, 4096)
    weights = [jax.random.randint(jax.random.key(i), (600, n), -128, 128, jnp.int8) for i, n in enumerate(outs)]
    scales = [jax.random.uniform(jax.random.key(5 + i), (n,)) for i, n in enumerate(outs)]
    kept = select(x, thresholds, ring.rows)
    found = sparse_product(kept, weights, scales, ring, "mosaic")
    assert_close(found, sparse_product(kept, weights, scales, implementation="xla"))
