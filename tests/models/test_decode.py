"""The kernels' decode step against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.fused_block import FusedConfig
from kernels_pallas.implementation import mosaic_problem
from wisparse_jax.models.config import INPUT_GROUPS, LAYERS
from wisparse_jax.models.decode import fused_step_problem, group_thresholds, kernel_token_logits, zero_thresholds
from wisparse_jax.models.forward import empty_cache, token_logits
from wisparse_jax.models.model import Model
from wisparse_jax.models.rules import rules_of
from wisparse_jax.testing import tiny_config, tiny_model

VARIANTS = {
    "plain": {},
    "window": {"windows": (4, None)},
    "qk-norm and bias": {"qk_norm": True, "qkv_bias": True},
    "all biases": {"o_bias": True, "mlp_bias": True, "qkv_bias": True},
    "tied": {"tied_embeddings": True},
}


def with_random_vectors(model):
    """Norms and biases that a mistake would show in."""
    leaves, tree = jax.tree.flatten(model.params)
    made = [
        w + 0.3 * jax.random.normal(jax.random.key(i), w.shape, w.dtype) if w.ndim == 1 else w
        for i, w in enumerate(leaves)
    ]
    return Model(model.config, jax.tree.unflatten(tree, made))


@pytest.mark.parametrize(
    ("name", "batch"),
    [("plain", 1), ("plain", 3), ("window", 1), ("qk-norm and bias", 3), ("all biases", 1), ("tied", 3)],
)
def test_its_logits_and_cache_are_the_plain_steps(name, batch):
    model = with_random_vectors(tiny_model(tiny_config(**{"num_blocks": 2, "windows": (None, None)} | VARIANTS[name])))
    config, interpret = model.config, jax.default_backend() != "gpu"
    thresholds = [
        {n: jnp.full(config.layer_shapes[n][0], 0.5 if n != "down" else 0.1) for n in LAYERS} for _ in range(2)
    ]
    grouped = group_thresholds(thresholds)
    start = jnp.array([0, 2, 1][:batch], jnp.int32)
    records = []

    def kernels(tokens, slot, cache):
        return kernel_token_logits(
            config, model.params, tokens, slot, start, cache, grouped, "triton", interpret, records
        )

    def plain(tokens, slot, cache):
        return token_logits(config, model.params, tokens, slot, start, cache, rules_of(thresholds))

    kernels, plain = jax.jit(kernels), jax.jit(plain)
    tokens = jax.random.randint(jax.random.key(1), (batch, 8), 0, config.vocab_size)
    one = other = empty_cache(config, batch, 32, jnp.float32)
    for slot in range(8):
        expected, one = plain(tokens[:, slot], jnp.int32(slot), one)
        found, other = kernels(tokens[:, slot], jnp.int32(slot), other)
        if slot >= 2:  # every row has begun
            assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert len(records) == 2 and set(records[0]) == {"attn_in", "attn_out", "mlp_in", "mlp_mid"}


def test_the_fused_step_is_the_separate_one():
    """In bfloat16, by its lists of kept channels and its logits; simulated where there is no Hopper GPU."""
    config = tiny_config(num_blocks=3, windows=(None, 3, None), head_dim=32, qk_norm=True, **VARIANTS["all biases"])
    model = with_random_vectors(tiny_model(config))
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), model.params)
    # Of 0 and of infinity, so that nothing is near its threshold.
    rng = np.random.default_rng(0)
    thresholds = [
        {n: jnp.asarray(rng.choice([0.0, np.inf], config.layer_shapes[n][0]).astype(np.float32)) for n in LAYERS}
        for _ in range(3)
    ]
    grouped, start, interpret = group_thresholds(thresholds), jnp.zeros(1, jnp.int32), mosaic_problem() is not None
    small = FusedConfig(ctas=6, threads=128, splits_in=1, splits_out=2, splits_down=2, attention_splits=2, depth=2)
    caches = [empty_cache(config, 1, 32, jnp.bfloat16)] * 2
    differences, kept = [], [[], []]
    for slot in range(5):
        token, out = jnp.array([3 + 5 * slot]), []
        for i, implementation in enumerate(("triton", "mosaic")):
            records = []
            logits, caches[i] = kernel_token_logits(
                config, params, token, jnp.int32(slot), start, caches[i], grouped, implementation, interpret, records,
                fused_config=small,
            )  # fmt: skip
            out.append(np.asarray(logits))
            kept[i].append([int(n) for record in records for g in INPUT_GROUPS for n in record[g].sum(1)])
        differences.append(np.abs(out[1] - out[0]).max() / np.abs(out[0]).max())
    assert np.median(differences) < 0.02 and kept[0] == kept[1]


def test_with_thresholds_of_zero_the_fused_step_is_the_dense_model():
    config = tiny_config(num_blocks=2, windows=(None, None), head_dim=32)
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), with_random_vectors(tiny_model(config)).params)
    start, interpret = jnp.zeros(1, jnp.int32), mosaic_problem() is not None
    small = FusedConfig(ctas=6, threads=128, splits_in=1, splits_out=2, splits_down=2, attention_splits=2, depth=2)
    caches, differences = [empty_cache(config, 1, 32, jnp.bfloat16)] * 2, []
    for slot in range(3):
        place = jnp.array([3 + 5 * slot]), jnp.int32(slot), start
        want, caches[0] = token_logits(config, params, *place, caches[0], None)
        got, caches[1] = kernel_token_logits(
            config, params, *place, caches[1], zero_thresholds(config), "mosaic", interpret, fused_config=small
        )
        differences.append(np.abs(got - want).max() / np.abs(want).max())
    assert np.median(differences) < 0.02


def test_a_model_that_the_fused_step_cannot_run_says_why():
    model = tiny_model(tiny_config(head_dim=32))
    assert "activations in bfloat16" in str(fused_step_problem(model.config, model.params, 1))
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), model.params)
    assert fused_step_problem(model.config, params, 1) is None
    assert "takes one sequence, found 2" in str(fused_step_problem(model.config, params, 2))
    narrow = tiny_model(tiny_config())
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), narrow.params)
    assert "takes heads of (32, 64, 128) features" in str(fused_step_problem(narrow.config, params, 1))
