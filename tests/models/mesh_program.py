"""What `test_mesh.py` runs on eight simulated devices: everything that a mesh does, against one device."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wisparse_jax as ws
from wisparse_jax.inference.steps import kernel_step, masked_step
from wisparse_jax.models import weights
from wisparse_jax.models.basis import Basis
from wisparse_jax.models.checkpoint import convert
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.decode import group_thresholds
from wisparse_jax.models.forward import empty_cache, token_logits
from wisparse_jax.models.loading import load
from wisparse_jax.models.mesh import make_mesh, param_shardings, place_on
from wisparse_jax.models.mesh_decode import mesh_token_logits
from wisparse_jax.models.model import Model
from wisparse_jax.models.parameters import flat
from wisparse_jax.models.rules import rules_of
from wisparse_jax.search import SearchSettings
from wisparse_jax.testing import tiny_config, tiny_model

SPLIT = {"embed", "lm_head", "q", "k", "v", "o", "gate", "up", "down"}


def off(found, expected):
    """The largest difference, of the largest number."""
    found, expected = np.asarray(found), np.asarray(expected)
    return np.abs(found - expected).max() / np.abs(expected).max()


def check_loading(folder):
    """Every device reads its own part of the same weights, and what they compute is the same."""
    one, placed, place = ws.load(folder), [], weights.place

    def recorded(stored, *rest):
        placed.append(stored.shape)
        return place(stored, *rest)

    weights.place, weights.read_tensor = recorded, None  # nothing is read whole
    many = ws.load(folder, mesh="data=4,model=2")
    assert many.fingerprint == one.fingerprint
    for path, leaf in flat(many.params).items():
        whole, part = flat(one.params)[path], leaf.addressable_shards[0].data
        np.testing.assert_array_equal(leaf, whole)
        parts = 2 if SPLIT & set(path.split(".")) and leaf.ndim == 2 else 1
        assert part.size * parts == whole.size, path
    assert max(map(np.prod, placed)) <= max(leaf.size for leaf in jax.tree.leaves(one.params)) // 2

    tokens = np.random.default_rng(0).integers(0, one.config.vocab_size, (4, 24)).astype(np.int32)
    logits = many(tokens)
    assert off(logits, one(tokens)) < 1e-5 and len(logits.sharding.device_set) == 8
    assert logits.addressable_shards[0].data.shape[0] == 1  # a window on each part of the data axis
    prompts = [[3, 5, 7], [8] * 9, [2, 3]]
    assert ws.generate(many, prompts, 10) == ws.generate(one, prompts, 10)
    with pytest.raises(ws.WisparseError, match=r"mesh: model = 4 does not divide num_key_value_heads = 2 of the model"):
        ws.load(folder, mesh="data=2,model=4")


def check_other_weights(folder):
    """Converted, rounded and folded weights lie as they should, and are those of one device."""
    converted = folder.with_name("converted")
    convert(folder, converted)
    rng = np.random.default_rng(3)
    stream, *heads = (np.linalg.qr(rng.standard_normal((n, n)))[0].astype(np.float32) for n in (32, *(8,) * 6))
    basis = Basis(jnp.asarray(stream), jnp.asarray(np.stack(heads).reshape(3, 2, 8, 8)))
    loads = [
        functools.partial(ws.load, converted),
        functools.partial(ws.load, folder, weights="int8", head="int8"),
        functools.partial(load, folder, basis=basis),
    ]
    for read in loads:
        one, many = read(), read(mesh="data=4,model=2")
        for path, leaf in flat(many.params).items():
            np.testing.assert_allclose(leaf, flat(one.params)[path], atol=2e-7, err_msg=path)
        specs = param_shardings(many.config, many.params, make_mesh("data=4,model=2"))
        assert jax.tree.map(lambda leaf: leaf.sharding, many.params) == specs
    with pytest.raises(ws.WisparseError, match="does not divide the groups of 128 int4 columns"):
        ws.load(folder, mesh="data=4,model=2", weights="int4")


def check_plan():
    """The same plan, and the same figures of it."""
    config = tiny_config(num_heads=8, num_kv_heads=4, vocab_size=96, num_blocks=2, windows=(None, None))
    one = tiny_model(config)
    many = Model(config, place_on(make_mesh("data=2,model=4", config), config, one.params))
    tokens = np.random.default_rng(1).integers(0, 96, (8, 48)).astype(np.int32)
    small = {"exponent_step": 0.5, "exponent_passes": 1, "exponent_tokens": 48, "layer_tokens": 48, "layer_step": 0.2}
    settings = SearchSettings(population=4, generations=2, block_tokens=96, chunk=2, compare_teal=False, **small)
    plans = [ws.calibrate(model, tokens, 0.5, sys.argv[2], settings=settings) for model in (one, many)]
    np.testing.assert_allclose(plans[1].sparsities, plans[0].sparsities, atol=1e-6)
    np.testing.assert_allclose(plans[1].thresholds, plans[0].thresholds, rtol=1e-4)
    np.testing.assert_array_equal(plans[1].exponents, plans[0].exponents)
    assert len(set(plans[0].sparsities.ravel())) > 2 and plans[0].exponents.any()  # a search that found something
    sparse = [ws.apply(model, plans[0]) for model in (one, many)]
    scores = [ws.evaluate(model, tokens[:3]).sparse["plan"] for model in sparse]
    np.testing.assert_allclose(scores[1].window_kl, scores[0].window_kl, rtol=1e-4)
    assert ws.generate(sparse[1], [[3, 5], [9]], 8) == ws.generate(sparse[0], [[3, 5], [9]], 8)


def check_sparse_decode():
    """The kernels' references on every device's own channels are the masked-dense step of one device."""
    biases = {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "qk_norm": True}
    config = tiny_config(num_heads=8, num_kv_heads=4, vocab_size=96, num_blocks=2, windows=(None, 4), **biases)
    rng = np.random.default_rng(2)
    noisy = jax.tree.map(lambda w: w + 0.3 * rng.standard_normal(w.shape, np.float32), tiny_model(config).params)
    highest = {name: 0.2 if name == "down" else 0.8 for name in LAYERS}
    limits = [
        {n: jnp.asarray(rng.uniform(0, highest[n], config.layer_shapes[n][0]), jnp.float32) for n in LAYERS}
        for _ in range(2)
    ]
    mesh = make_mesh("data=2,model=4", config)
    params, start = place_on(mesh, config, noisy), jnp.asarray([0, 2], jnp.int32)
    one = many = empty_cache(config, 2, 16, jnp.float32)
    plain = jax.jit(functools.partial(token_logits, config, rules=rules_of(limits)))
    split = jax.jit(
        functools.partial(
            mesh_token_logits, config, thresholds=group_thresholds(limits), mesh=mesh, implementation="xla"
        )
    )
    for slot in range(5):
        tokens = jnp.asarray(rng.integers(0, 96, 2).astype(np.int32))
        expected, one = plain(noisy, tokens, jnp.int32(slot), start, one)
        found, many = split(params, tokens, jnp.int32(slot), start, many)
        if slot >= 2:  # both rows have begun
            assert off(found, expected) < 1e-5
    assert many[0].keys.addressable_shards[0].data.shape == (1, 16, 1, 8)
    # With a factor of each row's own, also what each row skips.
    plain = jax.jit(masked_step(config, noisy, rules_of(limits)))
    split = jax.jit(kernel_step(config, params, group_thresholds(limits), mesh, implementation="xla"))
    place = jnp.asarray([3, 5], jnp.int32), jnp.int32(5), start
    expected, _, shares = plain(*place, one, jnp.asarray([0.8, 1.3]))
    found, _, others = split(*place, many, jnp.asarray([0.8, 1.3]))
    assert off(found, expected) < 1e-5 and shares[1] > shares[0] + 0.1
    np.testing.assert_allclose(others, shares, atol=1e-6)


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    assert jax.device_count() == 8
    check_other_weights(Path(sys.argv[1]))
    check_loading(Path(sys.argv[1]))
    check_sparse_decode()
    check_plan()
    print("the same")
