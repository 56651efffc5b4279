"""Models converted together with a plan load as the model with the plan, and as nothing else."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import wisparse_jax as ws
from kernels_pallas.weight import Weight
from wisparse_jax.cli import main
from wisparse_jax.errors import PlanError, WisparseError
from wisparse_jax.models.basis import Basis
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.fingerprint import model_fingerprint
from wisparse_jax.sparsity import SparsityPlan, own_plan
from wisparse_jax.testing import write_tiny_folder

TIED = Path(__file__).parents[1] / "fixtures" / "parity" / "smollm2"  # in bfloat16
EXACT = 1e-5  # of the largest logit, float32


def a_plan(model, basis=True, seed=0):
    """Half of the channels or so, with everything that a plan may have."""
    config, rng = model.config, np.random.default_rng(seed)
    shape, size = (config.num_blocks, len(LAYERS)), config.head_dim

    def vectors(axis, low, high):
        sizes = {name: config.layer_shapes[name][axis] for name in LAYERS}
        draw = [{n: rng.uniform(low, high, s) for n, s in sizes.items()} for _ in range(config.num_blocks)]
        return [{n: jnp.asarray(v, jnp.float32) for n, v in block.items()} for block in draw]

    heads = np.linalg.qr(rng.standard_normal((config.num_blocks, config.num_kv_heads, size, size)))[0]
    stream = np.linalg.qr(rng.standard_normal((config.hidden_size, config.hidden_size)))[0]
    return SparsityPlan(
        method="wisparse-plus",
        target=0.5,
        exponents=np.ones(shape),
        sparsities=np.full(shape, 0.5),
        thresholds=np.full(shape, 0.3),
        realised=np.full(shape, 0.5),
        layer_weights=config.layer_weights,
        fingerprint=model_fingerprint(model),
        seed=0,
        basis=Basis(jnp.asarray(stream, jnp.float32), jnp.asarray(heads, jnp.float32)) if basis else None,
        gains=vectors(0, 0.5, 2),
        biases=vectors(1, -0.1, 0.1),
    )


def error(found, wanted):
    # NumPy's maximum, as XLA's passes NaN by on a CPU.
    return float(np.abs(np.asarray(found - wanted)).max() / np.abs(np.asarray(wanted)).max())


@pytest.fixture(scope="module")
def model():
    return ws.load(TIED, "float32")


@pytest.fixture(scope="module")
def tokens(model):
    return jnp.asarray(np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 16)), jnp.int32)


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory):
    """In float32, with its plan."""
    out, plan = tmp_path_factory.mktemp("converted") / "out", a_plan(model)
    ws.convert(TIED, out, dtype="float32", plan=plan)
    return out, plan


def test_its_logits_are_those_of_the_model_with_the_plan(model, converted, tokens):
    out, plan = converted
    found, wanted = ws.load(out, "float32"), ws.load(TIED, "float32", plan=plan)
    assert model.config.tied_embeddings and "lm_head" in found.params
    assert error(found(tokens), wanted(tokens)) <= EXACT < error(found(tokens), model(tokens))
    # Without its plan it is the dense model, in another basis.
    dense = found.dense
    assert error(dense(tokens), model(tokens)) <= EXACT
    assert model_fingerprint(dense) == model_fingerprint(model) and dense.basis_digest == plan.basis.digest()
    assert dense.rules is None and dense.plan is None and found.plan.basis.digest() == plan.basis.digest()


@pytest.mark.parametrize("weights", ["int8", "int4", "int4+2+2"])
def test_rounding_comes_after_folding(model, tokens, tmp_path, weights):
    plan = a_plan(model)
    ws.convert(TIED, tmp_path / "out", weights, "int8", "float32", plan=plan)
    found = ws.load(tmp_path / "out", "float32")
    wanted = ws.load(TIED, "float32", weights, "int8", plan=plan)
    assert Weight.of(found.params["blocks"][0]["q"]).kind == weights
    assert error(found(tokens), wanted(tokens)) <= EXACT


def test_a_plan_without_a_basis_leaves_the_weights(model, tokens, tmp_path):
    plan = a_plan(model, basis=False)
    ws.convert(TIED, tmp_path / "out", plan=plan)
    found = ws.load(tmp_path / "out", "float32")
    assert "lm_head" not in found.params and error(found(tokens), ws.apply(model, plan)(tokens)) <= EXACT


def test_plans_of_one_basis_share_the_folded_weights(model, tokens):
    first, second = a_plan(model), a_plan(model)
    made = ws.apply(model, {"first": first, "second": second, "plain": a_plan(model, basis=False)})
    kernels = [made[name].params["blocks"][0]["q"]["kernel"] for name in ("first", "second", "plain")]
    assert kernels[0] is kernels[1] and kernels[2] is model.params["blocks"][0]["q"]["kernel"]
    for name, plan in (("first", first), ("plain", a_plan(model, basis=False))):
        np.testing.assert_array_equal(made[name](tokens), ws.apply(model, plan)(tokens))


def test_what_does_not_fit_is_refused(model, converted, tokens, tmp_path):
    out, plan = converted
    other = a_plan(model, seed=1)
    with pytest.raises(WisparseError, match="folded into the basis of another plan"):
        ws.load(out, plan=other)
    with pytest.raises(PlanError, match="this one is folded into the basis of another plan"):
        ws.load(out, plan=a_plan(model, basis=False))
    with pytest.raises(WisparseError, match="expected the model as it was"):
        ws.calibrate(ws.load(out), tokens)
    for again in (None, plan):
        with pytest.raises(WisparseError, match="folded into a plan's basis already; convert the model as it was"):
            ws.convert(out, tmp_path / "again", plan=again)
    with pytest.raises(PlanError, match="plan is for a model of 2 blocks; this model has 8"):
        ws.convert("demo", tmp_path / "again", plan=plan)
    assert not (tmp_path / "again").exists() and own_plan(TIED) is None
    own = own_plan(out)
    assert own is not None and own.basis is not None and own.basis.digest() == plan.basis.digest()


def test_the_command_folds_and_what_loads_it_says_so(tmp_path, capsys):
    write_tiny_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text("A boy sat on the wall and counted them as they passed the light. " * 8)
    plan = a_plan(ws.load(tmp_path / "model"))
    plan.save(tmp_path / "plan")
    where = [str(tmp_path / name) for name in ("model", "out", "plan")]
    main(["convert", where[0], where[1], "--plan", where[2]])
    ended = capsys.readouterr()
    assert (
        ended.out == f"{where[1]}\n" and "the wisparse-plus plan, sparsity 0.5, which is used by default" in ended.err
    )
    texts = []
    for options in ([where[0], "--plan", where[2]], [where[1]]):
        main(["generate", *options, "--prompt", "Seas", "--max-new-tokens", "6"])
        ended = capsys.readouterr()
        texts.append(ended.out)
    assert texts[0] == texts[1] and "sparsity 0.5, decoding by xla" in ended.err
    assert f"the plan that {where[1]} was converted with" in ended.err
    figures = []
    for options in ([where[0], "--plan", where[2]], [where[1]]):
        main(["evaluate", *options, "--text", str(tmp_path / "text.txt"), "--window", "64", "--json"])
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0]["kl"] == pytest.approx(figures[1]["kl"], rel=1e-4) and figures[1]["kl"] > 0.01
    assert figures[1]["method"] == "wisparse-plus"
