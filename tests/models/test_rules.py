"""What layers do where they run sparse, and that a sparse model is an argument like any other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.forward import empty_cache, head, hidden_states, layout, token_logits
from wisparse_jax.models.model import Model
from wisparse_jax.models.rules import ChannelRule, merge_biases, rules_of, thresholds_of
from wisparse_jax.testing import tiny_config, tiny_model


@pytest.fixture(scope="module")
def model():
    model = tiny_model(tiny_config(qkv_bias=True))
    blocks = [b | {"q": b["q"] | {"bias": 0.3 + jnp.zeros_like(b["q"]["bias"])}} for b in model.params["blocks"]]
    return type(model)(model.config, model.params | {"blocks": blocks})


def rules(config, seed=0, biased=True):
    """Random thresholds and biases."""

    def one(b, i, name):
        key, (size, out) = jax.random.key(100 * seed + 10 * b + i), config.layer_shapes[name]
        bias = 0.5 * jax.random.normal(key, (out,)) if biased else None
        return ChannelRule(jax.random.uniform(key, (size,)), bias)

    return [{name: one(b, i, name) for i, name in enumerate(LAYERS)} for b in range(config.num_blocks)]


@pytest.fixture(scope="module")
def sparse(model):
    return Model(model.config, model.params, rules(model.config))


TOKENS = jnp.arange(3, 15)[None]


def test_a_layer_skips_below_its_thresholds_and_adds_both_biases(model, sparse):
    """One block by hand: q's output from its input."""
    records: list[dict] = []
    where = layout(model.config, 1, 12)
    hidden_states(model.config, model.params, TOKENS, where, None, sparse.rules, records)
    x = np.asarray(records[0]["q"])
    rule, layer = sparse.rules[0]["q"], model.params["blocks"][0]["q"]
    from wisparse_jax.models.forward import _linear

    out = _linear(model.params["blocks"][0], sparse.rules[0], None, "q", jnp.asarray(x))
    limits, own, added = (np.asarray(a) for a in (rule.thresholds, layer["bias"], rule.bias))
    expected = np.where(np.abs(x) >= limits, x, 0) @ np.asarray(layer["kernel"]) + own + added
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_a_dense_prompt_sees_no_bias_and_decoding_does(model, sparse):
    config, start = model.config, jnp.zeros(1, jnp.int32)
    dense, cache = hidden_states(
        config, sparse.params, TOKENS, layout(config, 1, 12), empty_cache(config, 1, 16, jnp.float32)
    )
    np.testing.assert_array_equal(head(sparse.params, dense), head(model.params, dense))
    np.testing.assert_allclose(head(sparse.params, dense), model(TOKENS), rtol=1e-4, atol=1e-4)
    token = (config, model.params, jnp.array([5]), jnp.int32(12), start, cache)
    without = [{n: rule._replace(bias=None) for n, rule in block.items()} for block in sparse.rules]
    logits = [token_logits(*token, own)[0] for own in (None, without, sparse.rules)]
    assert all(jnp.abs(logits[i] - logits[j]).max() > 0.01 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_merged_biases_are_the_rules_biases(model, sparse):
    """Where all positions are sparse, which is what the kernels' step is given."""
    without = [{n: rule._replace(bias=None) for n, rule in block.items()} for block in sparse.rules]
    merged = Model(model.config, merge_biases(model.params, sparse.rules), without)
    np.testing.assert_allclose(merged(TOKENS), sparse(TOKENS), rtol=1e-4, atol=1e-4)
    untouched = merge_biases(model.params, without)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (untouched, model.params)), strict=True))


def test_thresholds_go_into_rules_and_out_again(sparse):
    limits = thresholds_of(sparse.rules)
    assert thresholds_of(rules_of(limits)) == limits and rules_of(limits)[1]["up"].bias is None
    broken = [dict(block) for block in sparse.rules]
    broken[2]["k"] = ChannelRule(None)
    with pytest.raises(ValueError, match="block 2, layer k: expected thresholds"):
        thresholds_of(broken)


def test_a_sparse_model_goes_through_jit_vmap_and_grad(model, sparse):
    run = jax.jit(lambda m, tokens: m(tokens))
    expected = sparse(TOKENS)
    np.testing.assert_allclose(run(sparse, TOKENS), expected, rtol=1e-4, atol=1e-4)
    other = Model(model.config, model.params, rules(model.config, 1))

    stacked = jax.tree.map(lambda *a: jnp.stack(a), sparse.rules, other.rules)
    axes = Model.tree_unflatten(model.config, (None, 0))
    both = jax.vmap(lambda m: m(TOKENS), in_axes=(axes,))(Model(model.config, model.params, stacked))
    for found, one in zip(both, (sparse, other), strict=True):
        np.testing.assert_allclose(found, one(TOKENS), rtol=1e-3, atol=1e-3)

    def loss(own):
        return jnp.sum(own(TOKENS)[0, -1, :5])

    gradient = jax.grad(loss)(sparse)
    assert isinstance(gradient, Model) and gradient.plan is None and gradient.rules is not None
    biases: Any = [block["down"].bias for block in sparse.rules]
    slope: Any = gradient.rules[2]["down"].bias
    step = 1e-2
    moved = jax.tree.map(lambda a: a, sparse)
    assert moved.rules is not None
    moved.rules[2]["down"] = moved.rules[2]["down"]._replace(bias=biases[2].at[3].add(step))
    assert (loss(moved) - loss(sparse)) / step == pytest.approx(float(slope[3]), rel=0.05, abs=1e-3)
    first: Any = gradient.rules[0]["q"].bias
    assert float(jnp.abs(first).max()) > 0
