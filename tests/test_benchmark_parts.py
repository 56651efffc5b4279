"""What the decode benchmark compares: the dense baseline is the model, and layers really skip their share."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wisparse_jax as ws
from kernels_pallas.sparse_linear.reference import keep_mask
from wisparse_jax.benchmark import Options, benchmark
from wisparse_jax.benchmark.cost import step_bytes
from wisparse_jax.benchmark.decode import stored_kinds
from wisparse_jax.benchmark.dense_step import dense_logits, fused
from wisparse_jax.benchmark.random_model import calibrated, random_cache, random_params, spread_shares, with_biases
from wisparse_jax.benchmark.table import add_ratios, report
from wisparse_jax.cli import main
from wisparse_jax.models.config import INPUT_GROUPS, LAYERS
from wisparse_jax.models.forward import hidden_states, layout, token_logits
from wisparse_jax.models.parameters import param_shapes
from wisparse_jax.models.quantise import quantise_params
from wisparse_jax.models.rules import rules_of
from wisparse_jax.testing import tiny_config, tiny_model


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "qkv_bias": True, "windows": (4, None, 4)}])
@pytest.mark.parametrize("kernels", [False, True])
def test_the_dense_baseline_is_the_plain_step(changes, kernels):
    model = tiny_model(tiny_config(**changes))
    config, params = model.config, model.params
    cache, start = random_cache(config, 2, 32, jnp.float32), jnp.array([0, 3], jnp.int32)
    token = (jnp.array([5, 9], jnp.int32), jnp.int32(20), start)
    expected, expected_cache = token_logits(config, params, *token, cache, None)
    found, found_cache = dense_logits(config, kernels, params, fused(params), *token, cache)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    for one, other in zip(jax.tree.leaves(found_cache), jax.tree.leaves(expected_cache), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_every_layer_of_a_random_model_skips_its_share():
    config = tiny_config(hidden_size=128, intermediate_size=256)
    params = random_params(config, "float32")
    cache, start = random_cache(config, 4, 64, jnp.float32), jnp.zeros(4, jnp.int32)
    thresholds = calibrated(config, params, cache, 32, 4, 0.6)
    records = []
    where = layout(config, 4, 1, jnp.int32(32), start)
    tokens = jnp.arange(5, 9)[:, None]
    hidden_states(config, params, tokens, where, cache, rules_of(thresholds), records)
    for limits, record in zip(thresholds, records, strict=True):
        for names in INPUT_GROUPS.values():
            kept = float(keep_mask(record[names[0]], limits[names[0]]).mean())
            assert abs(1 - kept - 0.6) < 0.1


def test_a_plan_and_every_kind_of_weights_are_timed_on_a_cpu():
    """Thresholds of 0 for a plan's; ratios are to the best dense step of the same weights, and of those as stored."""
    model = tiny_model()
    zeros = [{n: jnp.zeros(model.config.layer_shapes[n][0]) for n in LAYERS}] * model.config.num_blocks
    options = Options(weights=("stored", "int4"), context=(8,), tokens=2, repeats=1)
    rows = benchmark(model.config, model.params, options, zeros)
    names = ["dense, XLA", "sparse, xla, plan", "dense, XLA, int4 widened", "sparse, xla, plan, int4 widened"]
    assert [row["run"] for row in rows] == names
    speed = [row["tokens_per_second"] for row in rows]
    assert [row["ratio"] for row in rows] == [1.0, speed[1] / speed[0], 1.0, speed[3] / speed[2]]
    assert [row["ratio_to_stored"] for row in rows] == [one / speed[0] for one in speed]
    assert rows[1]["sparsity"] == rows[3]["sparsity"] == 0 and rows[1]["bytes"] == rows[0]["bytes"]
    assert all(name in report("title", rows) for name in names)


def test_a_shape_takes_the_shares_of_another_models_plan(repository):
    """Block by block at the same relative depth; of planes the share of each, which are read in their order."""
    plan = ws.SparsityPlan.load(repository / "tests/fixtures/format-2/plan")
    assert plan.realised is not None
    (first, *_, last), blocks = plan.realised, len(plan.realised)
    found = spread_shares(plan, 2 * blocks)
    np.testing.assert_array_equal(found[:2], [first, first])
    np.testing.assert_array_equal(found[-2:], [last, last])

    model = tiny_model(tiny_config(hidden_size=128, intermediate_size=256))
    rng, bits = np.random.default_rng(0), np.array([2.125, 2, 2, 2])
    shares = np.sort(rng.uniform(0.2, 0.9, (model.config.num_blocks, len(LAYERS), 4)), axis=-1)
    options = Options(weights=("int2+2+2+2",), context=(8,), tokens=24, repeats=1)
    rows = benchmark(model.config, model.params, options, shares=shares)
    assert [row["run"] for row in rows] == ["dense, XLA", "dense, XLA, int2+2+2+2", "sparse, xla, plan, int2+2+2+2"]
    asked = (shares @ (bits / bits.sum())).mean(axis=0)
    np.testing.assert_allclose(list(rows[2]["realised"].values()), asked, atol=0.06)


@pytest.mark.parametrize("heads", [("stored", "int8"), ("int8", "stored")])
def test_every_head_is_with_every_kind_of_weights_and_biases(heads):
    params = tiny_model().params
    made = stored_kinds(Options(weights=("stored", "int4"), head=heads, biases=True), params)
    for name, own in made.items():
        assert ("int8 head" in name) == isinstance(own["lm_head"], dict)
        assert own["blocks"][0]["q"]["kernel"].dtype == (jnp.uint8 if "int4" in name else jnp.float32)
        assert all(("bias" in block[layer]) == ("biases" in name) for block in own["blocks"] for layer in LAYERS)
    assert len(made) == 8


def test_a_bias_of_the_model_stays():
    params = tiny_model(tiny_config(qkv_bias=True)).params
    found = with_biases(params)["blocks"][1]
    assert found["q"]["bias"] is params["blocks"][1]["q"]["bias"] and float(abs(found["o"]["bias"]).min()) > 0


def test_the_bytes_of_a_step():
    """Half of the rows in int4, with a scale for each as all are below 128 wide; head and cache in bfloat16."""
    config = tiny_config()
    shapes = param_shapes(config, "bfloat16")
    weights, rows = sum(config.layer_weights), sum(config.layer_shapes[n][0] for n in LAYERS)
    head, cache = 32 * 97 * 2, 2 * 10 * 2 * 8 * 2 * 3
    assert step_bytes(config, shapes, 1.0, 10) == 3 * weights * 2 + head + cache
    small = jax.eval_shape(lambda p: quantise_params(p, "int4"), shapes)
    assert step_bytes(config, small, 0.5, 10, batch=2) == 3 * (weights / 2 + rows * 2) / 2 + head + 2 * cache


def test_the_command_times_a_model(repository, capsys):
    how = "--context 8 --tokens 2 --repeats 1"
    main(f"benchmark {repository}/tests/fixtures/parity/llama3.2 --sparsity 0.4 --json {how}".split())
    found = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in found["runs"]] == ["dense, XLA", "sparse, xla, 40%"]
    assert abs(found["runs"][1]["sparsity"] - 0.4) < 0.15 and found["device"] == "cpu"
    assert found["runs"][1]["bytes"] == found["runs"][0]["bytes"]  # masked products leave no row out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("demo --plan p --sparsity 0.5", "expected either --plan or --sparsity, found both"),
        ("demo --plan p --biases", "expected either --plan or --biases, which a plan has of its own, found both"),
        ("demo --implementation xla mosaic", "implementation = 'mosaic' needs an NVIDIA GPU"),
        ("llama-3.2-1b --blocks 17", "blocks = 17: expected at most 16, those of llama-3.2-1b"),
        ("demo --sparsity 50", r"sparsity = 50.0: .*did you mean 0.5\?"),
        ("demo --tokens 0", "tokens = 0: expected 1 or above"),
        ("demo --context 0", "context = 0: expected 1 or above"),
        ("demo --blocks 2", r"blocks: expected for a shape only \(llama-3-70b, "),
        (
            "demo --context 500",
            "context = 500: expected at most 408, as the model's context is 512 and a run writes 96 tokens",
        ),
        ("demo --tokens 600", "tokens = 600: expected below 504, the model's context"),
        ("llama-3.1-8b --plan p", "p: expected a plan folder, found no such folder"),
        ("demo --bits 3", "bits = 3.0: expected a plan for planes, found none"),
    ],
)
def test_bad_options_are_one_line(capsys, options, message):
    with pytest.raises(SystemExit) as caught:
        main(["benchmark", *options.split()])
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_ratios_are_to_the_fastest_dense_run_in_the_same_weights_and_as_stored():
    def row(weights, speed, **sparse):
        return {"weights": weights, "tokens_per_second": speed, **sparse}

    rows = [row("stored", 100.0), row("stored", 125.0), row("stored", 200.0, sparsity=0.5)]
    rows += [row("int8", 160.0), row("int8", 320.0, sparsity=0.5), row("int4", 500.0, sparsity=0.5)]
    add_ratios(rows)
    assert [r["ratio"] for r in rows] == [0.8, 1.0, 1.6, 1.0, 2.0, None]
    assert [r["ratio_to_stored"] for r in rows] == [0.8, 1.0, 1.6, 1.28, 2.56, 4.0]
