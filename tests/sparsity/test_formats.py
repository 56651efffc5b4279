"""Plans on disk: what format 1 wrote is still read, and format 2 keeps everything and notices every damage."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save

import wisparse_jax as ws
from wisparse_jax.errors import PlanError
from wisparse_jax.models.basis import Basis
from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.fingerprint import fingerprint, model_fingerprint
from wisparse_jax.sparsity import SparsityPlan, apply
from wisparse_jax.testing import tiny_config

DEMO = "f576e26463310f195bf9c9e088d7c6be6bfe97540da0857844fde9d1c488107a"
LLAMA3 = "0d9ec472c99bfebe8a25edcac4d5272479a8920b55f6c1fb7430cc50389aeede"


@pytest.mark.long  # with XLA's optimisations, as the logits were made: other roundings take channels over thresholds
def test_a_plan_of_format_1_gives_the_logits_that_it_gave(demo, repository):
    plan = SparsityPlan.load(repository / "tests/fixtures/format-1/plan")
    assert plan.basis is None and plan.gains is None and plan.biases is None and plan.realised is None
    assert plan.method == "wisparse" and plan.mean_realised == plan.mean_sparsity and plan.history
    with np.load(repository / "tests/fixtures/format-1/demo_sparse.npz") as file:
        tokens, expected = jnp.asarray(file["tokens"].astype(np.int32)), file["logits"]
    found = np.asarray(apply(demo, plan)(tokens)[0, -len(expected) :])
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_plan_of_format_1_is_written_as_format_2(repository, tmp_path):
    plan = SparsityPlan.load(repository / "tests/fixtures/format-1/plan")
    plan = dataclasses.replace(plan, realised=plan.sparsities)
    plan.save(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "plan.json").read_text())["format"] == 2
    found = SparsityPlan.load(tmp_path / "new").thresholds
    np.testing.assert_array_equal(np.float32(found), np.float32(plan.thresholds))


def test_fingerprints_are_those_of_format_1(demo, repository):
    assert model_fingerprint(demo) == DEMO
    assert model_fingerprint(ws.load(repository / "tests/fixtures/parity/llama3")) == LLAMA3


def test_a_checkpoint_of_format_1_loads(repository):
    converted = ws.load(repository / "tests/fixtures/format-1/checkpoint")
    model = ws.load(repository / "tests/fixtures/parity/llama3")
    assert model_fingerprint(converted) == fingerprint(converted.config, converted.params) == LLAMA3
    pairs = zip(*(jax.tree.leaves(m.params) for m in (converted, model)), strict=True)
    assert all(bool((a == b).all()) for a, b in pairs)


def test_a_new_field_of_the_configuration_makes_no_other_model(demo):
    Wider = dataclasses.make_dataclass("Wider", [("novelty", int, 3)], bases=(LlamaConfig,), frozen=True)
    config = Wider(**{f.name: getattr(demo.config, f.name) for f in dataclasses.fields(demo.config)})
    assert fingerprint(config, demo.params) == DEMO
    other = dataclasses.replace(demo.config, norm_eps=1e-3)
    assert fingerprint(other, demo.params) != DEMO


FORMAT_2 = {
    "plan.json": "29665c862f97f2f6db6575bf85bd2a9b7d79ecd2b0386ff0de1eb78ed95408fc",
    "history.json": "585cf2e26ec22b697dceeb31c494a4452d610cf34cc8e03ed2d0a2bb8ae7c56d",
    "tensors.safetensors": "ad6584a24e597aa80fc4e26e4a37be5ceb0215ac946e9cd666a19243972159b7",
}


def test_a_plan_of_format_2_as_it_was_first_written_is_read(repository, plan):
    """Its numbers have all digits of float64; it is the plan of the other tests."""
    folder = repository / "tests" / "fixtures" / "format-2" / "plan"
    assert {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()} == FORMAT_2
    assert_same(SparsityPlan.load(folder), plan, decimals=16)


def assert_same(one, other, decimals=6):
    """Two plans of equal fields; shares, which only people read, are rounded."""
    for field in dataclasses.fields(SparsityPlan):
        a, b = (jax.tree.leaves(getattr(p, field.name)) for p in (one, other))
        if field.name in ("sparsities", "realised"):
            np.testing.assert_allclose(a, b, rtol=0, atol=0.51 * 10**-decimals)
        elif field.name in ("thresholds", "exponents"):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
        else:
            assert len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)), field.name


@pytest.fixture(scope="module")
def plan():
    """Everything that a plan may have, of a model of three blocks."""
    config, rng = tiny_config(), np.random.default_rng(0)
    heads = np.linalg.qr(rng.standard_normal((3, config.num_kv_heads, config.head_dim, config.head_dim)))[0]
    stream = np.linalg.qr(rng.standard_normal((config.hidden_size, config.hidden_size)))[0]
    vectors = [
        [{n: jnp.asarray(rng.uniform(0.5, 2, config.layer_shapes[n][i]), jnp.float32) for n in LAYERS} for _ in "abc"]
        for i in (0, 1)
    ]
    sparsities = np.full((3, 7), 0.5)
    return SparsityPlan(
        method="wisparse-plus",
        target=0.5,
        exponents=rng.uniform(0, 1, (3, 7)),
        sparsities=sparsities,
        thresholds=rng.uniform(0, 1, (3, 7)),
        realised=rng.uniform(0.4, 0.6, (3, 7)),
        layer_weights=config.layer_weights,
        fingerprint="ab" * 32,
        seed=3,
        basis=Basis(jnp.asarray(stream, jnp.float32), jnp.asarray(heads, jnp.float32)),
        gains=vectors[0],
        biases=vectors[1],
        calibration={"text": "self", "tokens": 12},
        held_out={"windows": 2, "plan": {"kl": 0.25}},
        history={"notes": ["dropped"], "budgets 0.5": {"predicted": 0.2}},
        timings={"basis": 1.5},
        version="0.1.0",
    )


def test_everything_survives_a_round_trip(plan, tmp_path):
    plan.save(tmp_path / "plan")
    again = SparsityPlan.load(tmp_path / "plan")
    assert_same(again, plan)
    assert isinstance(again.basis, Basis) and again.basis.digest() == plan.basis.digest()
    assert "budgets" not in (tmp_path / "plan" / "plan.json").read_text()  # the history has a file of its own
    assert SparsityPlan.load(tmp_path / "plan" / "plan.json").target == 0.5
    again.save(tmp_path / "again")
    pair = [(tmp_path / name / "plan.json").read_bytes() for name in ("plan", "again")]
    assert pair[0] == pair[1]  # what is rounded once stays


def test_the_file_is_short_enough_to_read(plan, tmp_path):
    """A line for each layer, and records with no more digits than were measured."""
    dataclasses.replace(plan, held_out={"windows": 2, "plan": {"kl": 1 / 3, "perplexity": float("inf")}}).save(
        tmp_path / "plan"
    )
    text = (tmp_path / "plan" / "plan.json").read_text()
    layers = [line for line in text.splitlines() if '"threshold"' in line]
    assert len(layers) == 3 * len(LAYERS) and max(map(len, text.splitlines())) <= 130
    assert '"held_out": {"windows": 2, "plan": {"kl": 0.333333, "perplexity": null}}' in text


@pytest.mark.parametrize("part", ["basis", "gains", "biases"])
def test_each_part_may_be_missing(plan, tmp_path, part):
    dataclasses.replace(plan, **{part: None}).save(tmp_path / "plan")
    again = SparsityPlan.load(tmp_path / "plan")
    assert [name for name in ("basis", "gains", "biases") if getattr(again, name) is None] == [part]


def change(data, name):
    data[name].flat[0] = np.nan


# What is done to the tensors, and what is said of it; the digest in plan.json is made to fit.
TENSORS = {
    "missing": (lambda t: t.pop("blocks.1.up.bias"), r"tensors blocks\.\*\.bias: expected those of 3 blocks"),
    "basis alone": (lambda t: t.pop("basis.heads"), r"tensor 'basis\.stream' is unexpected, or others that go with it"),
    "extra": (lambda t: t.update(novelty=np.ones(2, np.float32)), "tensor 'novelty' is unexpected"),
    "not a number": (lambda t: change(t, "blocks.2.q.gain"), r"tensor blocks\.2\.q\.gain: expected finite float32"),
    "another dtype": (
        lambda t: t.update({"basis.stream": t["basis.stream"].astype(np.float16)}),
        r"tensor basis\.stream: expected finite float32",
    ),
    "not orthogonal": (
        lambda t: t["basis.heads"].__imul__(1.01),
        r"tensor basis\.heads is not orthogonal: off by 0\.02",
    ),
    "another shape": (
        lambda t: t.update({"blocks.0.q.bias": np.ones((2, 3), np.float32)}),
        r"tensor blocks\.0\.q\.bias: expected another shape, found \[2, 3\]",
    ),
    "another basis shape": (
        lambda t: t.update({"basis.heads": np.eye(8, dtype=np.float32)[None, None].repeat(2, 0)}),
        r"tensor basis\.heads: expected another shape, found \[2, 1, 8, 8\]",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_damaged_tensors_are_refused_by_name(plan, tmp_path, name):
    edit, message = TENSORS[name]
    plan.save(tmp_path / "plan")
    file, head = tmp_path / "plan" / "tensors.safetensors", tmp_path / "plan" / "plan.json"
    tensors = {key: value.copy() for key, value in load_file(file).items()}
    edit(tensors)
    data = save(tensors)
    file.write_bytes(data)
    raw = json.loads(head.read_text())
    head.write_text(json.dumps(raw | {"tensors": hashlib.sha256(data).hexdigest()}))
    with pytest.raises(PlanError, match=message) as caught:
        SparsityPlan.load(tmp_path / "plan")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_changed_byte_or_a_missing_file_is_noticed(plan, tmp_path):
    plan.save(tmp_path / "plan")
    file = tmp_path / "plan" / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(PlanError, match="changed or damaged: expected sha256") as caught:
        SparsityPlan.load(tmp_path / "plan")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    file.write_bytes(b"no tensors")
    head = tmp_path / "plan" / "plan.json"
    raw = json.loads(head.read_text())
    head.write_text(json.dumps(raw | {"tensors": hashlib.sha256(b"no tensors").hexdigest()}))
    with pytest.raises(PlanError, match="not readable as safetensors"):
        SparsityPlan.load(tmp_path / "plan")
    file.unlink()
    with pytest.raises(PlanError, match=r"tensors\.safetensors") as caught:
        SparsityPlan.load(tmp_path / "plan")
    assert "\n" not in str(caught.value)


JSON = {
    "realised missing": (lambda r: r["blocks"][0]["q"].pop("realised"), "realised"),
    "realised not a number": (
        lambda r: r["blocks"][0]["q"].update(realised="much"),
        "realised = 'much': expected a number",
    ),
    "realised out of range": (lambda r: r["blocks"][0]["q"].update(realised=1.5), "realised: expected numbers from 0"),
    "held out": (lambda r: r.update(held_out=[1]), r"held_out = \[1\]: expected an object"),
    "tensors": (lambda r: r.update(tensors=3), "tensors: expected|tensors = 3"),
    "seed": (lambda r: r.update(seed="x"), "seed"),
}


@pytest.mark.parametrize("name", JSON)
def test_damaged_numbers_of_format_2_are_refused(plan, tmp_path, name):
    edit, message = JSON[name]
    plan.save(tmp_path / "plan")
    file = tmp_path / "plan" / "plan.json"
    raw = json.loads(file.read_text())
    edit(raw)
    file.write_text(json.dumps(raw))
    with pytest.raises(PlanError, match=message) as caught:
        SparsityPlan.load(tmp_path / "plan")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
