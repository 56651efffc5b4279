"""Folding a basis into the weights leaves the function as it is."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import wisparse_jax as ws
from wisparse_jax.errors import PlanError, WisparseError
from wisparse_jax.inference import generate
from wisparse_jax.models.basis import Basis, fold, folded_config, identity_basis
from wisparse_jax.models.checkpoint import convert
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.fingerprint import flat
from wisparse_jax.models.kl import kl_divergence
from wisparse_jax.models.loading import load
from wisparse_jax.models.model import Model
from wisparse_jax.models.quantise import quantise, round_params
from wisparse_jax.sparsity import SparsityPlan, apply
from wisparse_jax.sparsity.plan import check_basis
from wisparse_jax.testing import tiny_config, tiny_model

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"
VARIANTS = sorted(folder.name for folder in FIXTURES.iterdir())
EXACT = 1e-5  # of the largest logit, float32
BFLOAT16_KL = 2e-3  # nats per token, demo model; a hundredth of what half of the channels cost


def random_basis(config, seed=0):
    """Orthogonal matrices for the stream and for every key/value group."""
    rng, size = np.random.default_rng(seed), config.head_dim
    heads = rng.standard_normal((config.num_blocks, config.num_kv_heads, size, size))
    stream = rng.standard_normal((config.hidden_size, config.hidden_size))
    return Basis(*(jnp.asarray(np.linalg.qr(a)[0], jnp.float32) for a in (stream, heads)))


def folded(model, basis):
    return Model(folded_config(model.config), fold(model.config, model.params, basis))


def with_random_vectors(model):
    """Norms and biases that a mistake would show in."""
    made = [
        w + 0.3 * jax.random.normal(jax.random.key(i), w.shape, w.dtype) if w.ndim == 1 else w
        for i, w in enumerate(jax.tree.leaves(model.params))
    ]
    return Model(model.config, jax.tree.unflatten(jax.tree.structure(model.params), made))


def error(found, wanted):
    # NumPy's maximum, as XLA's passes NaN by on a CPU.
    return float(np.abs(np.asarray(found - wanted)).max() / np.abs(np.asarray(wanted)).max())


def plan_of(model, basis):
    """A plan that skips nothing, with a basis."""
    zero = np.zeros((model.config.num_blocks, len(LAYERS)))
    from wisparse_jax.models.fingerprint import model_fingerprint

    weights = model.config.layer_weights
    return SparsityPlan("uniform", 0.0, zero, zero, zero, weights, model_fingerprint(model), 0, zero, basis)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_computes_the_same_in_another_basis(variant):
    """With left padding, and past the sliding windows; the checkpoints' norms, biases and rotary angles are random."""
    model = load(FIXTURES / variant, dtype="float32")
    ref = load_file(FIXTURES / variant / "reference.safetensors")
    other, start = folded(model, random_basis(model.config)), ref["start"]
    tokens, begin = jnp.asarray(ref["padded_tokens"]), jnp.asarray(start)
    real = np.arange(tokens.shape[1]) >= start[:, None]
    expected, found = model(tokens, begin), other(tokens, begin)
    assert error(found[real], expected[real]) < EXACT
    if any(model.config.windows):
        long = jnp.asarray(ref["long_tokens"])
        assert error(other(long), model(long)) < EXACT
    assert error(other.params["blocks"][0]["q"]["kernel"], model.params["blocks"][0]["q"]["kernel"]) > 0.1


MIXED = {
    "all biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "tied_embeddings": True},
    "qk-norm and windows": {"qk_norm": True, "windows": (4, None, 4)},
}


@pytest.mark.parametrize("name", MIXED)
def test_greedy_text_is_the_same(name):
    model = with_random_vectors(tiny_model(tiny_config(eos_token_ids=(), **MIXED[name])))
    sparse = apply(model, plan_of(model, random_basis(model.config)))
    prompts = [[5, 9, 2, 40, 11], [3], [7, 7, 7, 60, 61, 62]]
    assert generate(sparse, prompts, 20) == generate(model, prompts, 20)
    assert error(sparse(jnp.asarray([prompts[2]])), model(jnp.asarray([prompts[2]]))) < EXACT


def test_consuming_gives_the_same_and_lets_go_of_every_tensor():
    model = with_random_vectors(tiny_model(tiny_config(qkv_bias=True, qk_norm=True)))
    basis, params = random_basis(model.config), model.params
    expected = fold(model.config, params, basis)
    assert all(a is b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(model.params), strict=True))
    blocks = list(params["blocks"])
    found = fold(model.config, params, basis, consume=True)
    assert flat(found).keys() == flat(expected).keys()
    assert all(bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True))
    assert params == {} and not any(jax.tree.leaves(block) for block in blocks)


def test_a_tied_model_gets_a_head_of_its_own():
    config = tiny_config(tied_embeddings=True)
    params = fold(config, tiny_model(config).params, identity_basis(config))
    assert params["lm_head"].shape == (config.hidden_size, config.vocab_size)
    assert (
        not folded_config(config).tied_embeddings
        and dataclasses.replace(folded_config(config), tied_embeddings=True) == config
    )


def test_a_model_in_the_basis_of_one_plan_refuses_another_plan():
    model = tiny_model()
    basis = random_basis(model.config)
    plan, other = plan_of(model, basis), plan_of(model, random_basis(model.config, 1))
    made = model.with_weights(folded_config(model.config), folded(model, basis).params, basis.digest())
    tokens = jnp.arange(12)[None]
    assert error(apply(made, plan)(tokens), model(tokens)) < EXACT
    for wrong in (other, plan_of(model, None)):
        with pytest.raises(PlanError, match="folded into the basis of another plan"):
            apply(made, wrong)


def test_a_plan_of_another_model_is_refused_before_anything_is_folded():
    """Another width: folding itself would fail."""
    plan = plan_of(tiny_model(), random_basis(tiny_config()))
    with pytest.raises(PlanError, match="plan is for"):
        ws.load(FIXTURES / "llama3", "float32", plan=plan)


def test_int8_comes_after_folding():
    folder = FIXTURES / "llama3"
    model = load(folder, dtype="float32")
    plan = plan_of(model, random_basis(model.config))
    with pytest.raises(PlanError, match=r"plan has a basis: weights that are rounded already cannot be folded"):
        apply(quantise(model), plan)
    small = ws.load(folder, "float32", "int8", plan=plan)
    assert small.params["blocks"][0]["q"]["kernel"].dtype == jnp.int8
    tokens = jnp.asarray(load_file(folder / "reference.safetensors")["tokens"])
    assert 1e-5 < error(small(tokens), model(tokens)) < 0.1
    # Exactly the folded weights, rounded.
    rounded = quantise(folded(model, plan.basis))
    np.testing.assert_array_equal(small(tokens), rounded(tokens))


def test_a_checkpoint_may_hold_the_folded_and_rounded_model(tmp_path):
    """A plan with that basis takes it as it is, bit for bit; a plan with another basis cannot."""
    folder = FIXTURES / "llama3.2"
    tokens = np.asarray(load_file(folder / "reference.safetensors")["tokens"])
    model = load(folder, dtype="bfloat16")
    plan, other = (plan_of(model, random_basis(model.config, seed)) for seed in (0, 1))
    convert(folder, tmp_path / "out", "int4", "int8", basis=plan.basis, tokens=tokens)
    small = ws.load(tmp_path / "out", "bfloat16", plan=plan)
    wide = folded_config(model.config), fold(model.config, model.params, random_basis(model.config))
    expected = round_params(*wide, "int4", "int8", tokens, "float32")
    assert small.config == wide[0] and jax.tree.structure(small.params) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(small.params), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    with pytest.raises(WisparseError, match="its weights are folded into the basis of another plan"):
        ws.load(tmp_path / "out", plan=other)
    with pytest.raises(WisparseError, match="its weights are folded into a plan's basis already"):
        convert(tmp_path / "out", tmp_path / "again")


def test_what_bfloat16_costs(demo, demo_text):
    """Folded weights are rounded anew: the KL to the model as it was, both in bfloat16, is far below a plan's."""
    tokens = jnp.asarray(demo_text["held_out"][:2, :256])
    model = ws.load("demo", dtype="bfloat16")
    other = folded(model, random_basis(model.config))
    cost = float(kl_divergence(model(tokens), other(tokens)).mean())
    assert 0 < cost < BFLOAT16_KL, cost


def test_a_basis_that_is_no_numbers_is_refused():
    """XLA's maximum passes NaN by on a CPU, in arrays of some sizes."""
    heads = jnp.broadcast_to(jnp.eye(4), (1, 1, 4, 4))
    for size in (8, 64):
        check_basis(Basis(jnp.eye(size), heads), "here")
        with pytest.raises(PlanError, match=r"here: tensor basis\.stream is not orthogonal: off by nan"):
            check_basis(Basis(jnp.eye(size).at[3, 5].set(jnp.nan), heads), "here")
