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
from kernels_pallas.sparse_product.config import ring_problem, ring_space, valid
from wisparse_jax.models.config import INPUT_GROUPS, read_config
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


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b", "llama-3-70b", "qwen2.5-7b", "qwen3-8b"])
def test_products_lower(repository, mosaic, name):
    config = read_config(repository / f"configs/{name}.json")
    for layers in INPUT_GROUPS.values():
        size_in, sizes = config.layer_shapes[layers[0]][0], tuple(config.layer_shapes[n][1] for n in layers)
        ring = next(ring_space(size_in, sizes))
        x = jax.ShapeDtypeStruct((1, size_in), jnp.bfloat16)
        thresholds = jax.ShapeDtypeStruct((len(sizes), size_in), jnp.float32)
        kept = jax.eval_shape(functools.partial(select, rows=ring.rows, implementation="xla"), x, thresholds)
        weights = [jax.ShapeDtypeStruct((size_in, n), jnp.bfloat16) for n in sizes]
        product = functools.partial(sparse_product, config=ring, implementation="mosaic")
        text = lower_for_gpu(lambda kept, *weights, run=product: run(kept, weights), kept, *weights)
        assert text.count(f"@{MOSAIC_CALL}") == 1


def test_what_it_cannot_run_is_refused():
    assert ring_problem(RING, (512, 256), 1, jnp.bfloat16) is None
    for changes, sizes, batch, dtype, reason in [
        ({}, (256,), 2, "bfloat16", "takes one sequence and bfloat16 weights, found 2 and bfloat16"),
        ({}, (256,), 1, "float32", "found 1 and float32"),
        ({}, (256, 100), 1, "bfloat16", "must divide [256, 100]"),
        ({"slots": 99}, (256,), 1, "bfloat16", "bytes of shared memory"),
        ({"slots": 3}, (256,), 1, "bfloat16", "4 to 128 slots"),
    ]:
        assert reason in str(ring_problem(dataclasses.replace(RING, **changes), sizes, batch, dtype))
    kept = select(jnp.ones((1, 128)), jnp.zeros((1, 128)), 64, implementation="xla")
    if mosaic_problem() is not None:
        with pytest.raises(ValueError, match="implementation = 'mosaic' needs"):
            sparse_product(kept, [jnp.ones((128, 256))], config=RING, implementation="mosaic")
    with pytest.raises(ValueError, match="Triton takes a Config, Mosaic a Ring"):
        sparse_product(kept, [jnp.ones((128, 256))], config=RING, implementation="triton", interpret=True)


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
            assert (batch, width) == ("1", "2")
            assert ring_problem(Ring(**fields), sizes, 1, jnp.bfloat16) is None
            found = functools.partial(config_for, int(size_in), sizes, 1, device=tuned["device"])
            assert isinstance(found("bfloat16", mosaic=True), Ring)
            assert isinstance(found("bfloat16"), Config) and isinstance(found("float16", mosaic=True), Config)


@runs
@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize(("size", "outs"), [(640, (1024, 2048)), (1000, (1024,)), (64, (3072, 1024, 1024))])
@pytest.mark.parametrize("keep", ["half", "all", "none", "one", "inf"])
def test_product(ring, size, outs, keep):
    x = jax.random.normal(jax.random.key(0), (1, size)).astype(jnp.bfloat16)
    thresholds = jnp.abs(jax.random.normal(jax.random.key(1), (len(outs), size)))
    weights = [jax.random.normal(jax.random.key(2 + i), (size, n), jnp.bfloat16) for i, n in enumerate(outs)]
    if keep != "half":
        thresholds = jnp.full_like(thresholds, 0.0 if keep in ("all", "inf") else jnp.inf)
    if keep == "one":
        thresholds = thresholds.at[:, 37].set(0)
    if keep == "inf":
        x = x.at[0, 5].set(jnp.inf)
    kept = select(x, thresholds, ring.rows)
    found = sparse_product(kept, weights, config=ring, implementation="mosaic")
    expected = sparse_product(kept, weights, implementation="xla")
    for one, other in zip(found, expected, strict=True):
        one, other = np.asarray(one.sum(0)), np.asarray(other.sum(0))
        real = np.isfinite(other)
        assert (np.isfinite(one) == real).all()
        assert np.abs(one - other)[real].max(initial=0) <= 1e-3 * max(np.abs(other[real]).max(initial=0), 1e-30)
