import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from wisparse_jax.errors import PlanError
from wisparse_jax.search import SearchSettings, calibrate
from wisparse_jax.sparsity import SparsityPlan, apply

QUICK = SearchSettings(statistics_tokens=64, compare_teal=False)


@pytest.fixture(scope="module")
def plan(tiny_model, tiny_tokens):
    return calibrate(tiny_model, tiny_tokens, sparsity=0.4, method="wina", settings=QUICK)


@pytest.fixture
def damaged(plan, tmp_path):
    """Save the plan, change its JSON by `edit`, and give its path."""

    def make(edit):
        path = tmp_path / "plan"
        plan.save(path)
        raw = json.loads((path / "plan.json").read_text())
        edit(raw)
        (path / "plan.json").write_text(json.dumps(raw))
        return path

    return make


def test_a_saved_plan_loads_equal(plan, tmp_path):
    plan.save(tmp_path / "plan")
    again = SparsityPlan.load(tmp_path / "plan")
    for name in ("exponents", "thresholds"):  # which models use in float32
        np.testing.assert_array_equal(np.float32(getattr(again, name)), np.float32(getattr(plan, name)))
    np.testing.assert_allclose(again.sparsities, plan.sparsities, rtol=0, atol=5.1e-7)
    assert again.method == "wina" and again.target == 0.4 and again.fingerprint == plan.fingerprint
    assert again.settings == plan.settings and again.timings == plan.timings


def test_a_loaded_plan_gives_the_same_logits(plan, tiny_model, tiny_tokens, tmp_path):
    plan.save(tmp_path / "plan")
    again = apply(tiny_model, SparsityPlan.load(tmp_path / "plan"))
    np.testing.assert_array_equal(apply(tiny_model, plan)(tiny_tokens), again(tiny_tokens))


def test_the_plan_records_what_a_result_must_state(plan):
    assert plan.calibration["tokens"] == 3 * 48 and plan.calibration["held_out_windows"] == 1
    assert plan.calibration["window"] == 48
    assert "statistics" in plan.timings and plan.version and len(plan.fingerprint) == 64


def test_an_existing_folder_is_not_overwritten(plan, tmp_path):
    (tmp_path / "plan").mkdir()
    with pytest.raises(PlanError, match="exists already"):
        plan.save(tmp_path / "plan")
    assert list((tmp_path / "plan").iterdir()) == []


def test_nothing_is_left_behind_when_saving_fails(plan, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.write_bytes", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(PlanError, match="disk full"):
        plan.save(tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


def test_another_models_plan_is_refused(plan, tiny_model, tiny_config):
    import jax
    from flax import nnx

    from wisparse_jax.models.model import Model

    other = Model.random(tiny_config, nnx.Rngs(jax.random.key(99)))
    with pytest.raises(PlanError, match="another model"):
        apply(other, plan)


BAD = {
    "no number": (
        lambda r: r["blocks"][1]["q"].update(sparsity="half"),
        r"blocks\[1\].q.sparsity = 'half': expected",
    ),
    "not a number": (lambda r: r["blocks"][0]["up"].update(threshold=float("nan")), "not readable as JSON"),
    "too large": (lambda r: r["blocks"][0]["up"].update(exponent=17.0), r"blocks\[0\].up.exponent: expected a finite"),
    "negative": (lambda r: r["blocks"][0]["k"].update(threshold=-1.0), r"blocks\[0\].k.threshold"),
    "above one": (lambda r: r["blocks"][0]["k"].update(sparsity=1.5), r"blocks\[0\].k.sparsity"),
    "missing layer": (lambda r: r["blocks"][0].pop("v"), r"blocks\[0\]: expected the layers q, k, v"),
    "missing field": (lambda r: r.pop("fingerprint"), "fingerprint: expected a value, found nothing"),
    "another version": (lambda r: r.update(format=99), "format = 99: this version reads formats 1, 2, 3"),
    "off target": (lambda r: r.update(target=0.7), "mean sparsity is 0.400000, but target = 0.7"),
    "no blocks": (lambda r: r.update(blocks=[]), "blocks: expected at least one"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_plan_is_refused_with_the_reason(damaged, name):
    edit, message = BAD[name]
    path = damaged(edit)
    with pytest.raises(PlanError, match=message) as caught:
        SparsityPlan.load(path)
    assert str(path / "plan.json") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_and_everything_skipped_are_plans(plan, tmp_path, share):
    changed = dataclasses.replace(plan, target=share, sparsities=np.full_like(plan.sparsities, share))
    changed.save(tmp_path / "plan")
    assert SparsityPlan.load(tmp_path / "plan").mean_sparsity == share


def test_what_is_realised_is_the_target_until_it_was_measured(plan):
    unmeasured = dataclasses.replace(plan, realised=None)
    assert unmeasured.mean_realised == plan.mean_sparsity
    half = dataclasses.replace(plan, realised=plan.sparsities / 2)
    assert half.mean_realised == pytest.approx(plan.mean_sparsity / 2)


def test_figures_that_are_no_numbers_are_dashes(plan):
    rows = {"plan": {"perplexity": 12.345, "kl": None, "sparsity": 0.25}, "windows": 3}
    assert dataclasses.replace(plan, held_out=rows).held_out_rows() == [("plan", "12.35", "-", "0.2500")]


def test_what_is_not_a_plan_is_refused(tmp_path):
    with pytest.raises(PlanError, match="no such folder"):
        SparsityPlan.load(tmp_path / "missing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(PlanError, match="expected a plan folder, found a file"):
        SparsityPlan.load(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PlanError, match=r"no plan\.json in it"):
        SparsityPlan.load(tmp_path / "empty")
    (tmp_path / "empty" / "plan.json").write_text("{truncated")
    with pytest.raises(PlanError, match="not readable as JSON"):
        SparsityPlan.load(tmp_path / "empty")


def test_a_plan_of_other_sizes_than_the_models_is_refused(plan, tiny_model, tiny_config):
    """Its fingerprint may be right: a file can be edited. A vector of one number would fit everywhere."""
    from wisparse_jax.models.basis import identity_basis

    shapes = tiny_config.layer_shapes
    basis = identity_basis(tiny_config)
    blocks = range(tiny_config.num_blocks)
    gains = [{name: jnp.ones(shape[0]) for name, shape in shapes.items()} for _ in blocks]
    biases = [{name: jnp.zeros(shape[1]) for name, shape in shapes.items()} for _ in blocks]
    apply(tiny_model, dataclasses.replace(plan, gains=gains, biases=biases, basis=basis))
    weights = tuple(2 * weight for weight in plan.layer_weights)
    for changes, message in (
        ({"layer_weights": weights}, f"layer_weights: expected the model's {plan.layer_weights}, found {weights}"),
        ({"gains": [*gains[:2], gains[2] | {"up": jnp.ones(1)}]}, "gains[2].up: expected the model's shape (32,), "),
        ({"biases": [biases[0] | {"k": jnp.ones(1)}, *biases[1:]]}, "biases[0].k: expected the model's shape (16,), "),
        ({"basis": basis._replace(stream=jnp.eye(8))}, "basis.stream: expected the model's shape (32, 32), "),
        ({"basis": basis._replace(heads=basis.heads[:1])}, "basis.heads: expected the model's shape (3, 2, 8, 8), "),
    ):
        with pytest.raises(PlanError, match=re.escape(message)):
            apply(tiny_model, dataclasses.replace(plan, **changes))
