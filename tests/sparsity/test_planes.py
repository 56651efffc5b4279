"""Curves of planes: budgets of bits, thresholds, and plans that serve every number of bits."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import wisparse_jax as ws
from kernels_pallas.formats import FORMATS
from wisparse_jax.benchmark.cost import token_bytes
from wisparse_jax.errors import PlanError, WisparseError
from wisparse_jax.models.config import LAYERS
from wisparse_jax.report.comparison import compare
from wisparse_jax.sparsity.planes import LEVELS, PlaneCurves, plane_thresholds

KIND = "int2+2+2+2"
BLOCKS, WEIGHTS = 2, (64, 32, 32, 64, 128, 128, 128)


def some_curves(seed=0):
    """Costs and thresholds that ascend, dearer for the upper planes."""
    rng = np.random.default_rng(seed)
    shape = (BLOCKS, len(LAYERS), 4, len(LEVELS) - 1)
    steps = rng.exponential(1.0, shape) * np.array([1, 0.1, 0.01, 0.001])[:, None]
    start = np.zeros((*shape[:3], 1))
    costs, thresholds = (
        np.concatenate([start, np.cumsum(part, -1)], -1) for part in (steps, rng.exponential(0.1, shape))
    )
    gains = [{name: jnp.asarray(rng.uniform(0.5, 2, (4, 8)), jnp.float32) for name in LAYERS} for _ in range(BLOCKS)]
    levels, thresholds, costs = (a.astype(np.float32).astype(np.float64) for a in (LEVELS, thresholds, costs))
    return PlaneCurves(KIND, levels, thresholds, costs, gains)


@pytest.mark.parametrize("bits", [1.0, 2.3, 3.3, 5.0, 8.125])
def test_a_budget_reads_as_many_bits_as_are_asked_for(bits):
    curves = some_curves()
    assert curves.plane_bits == (2.125, 2.0, 2.0, 2.0) and curves.stored_bits == 8.125
    skipped = curves.skipped(WEIGHTS, 1 - bits / 8.125)
    shares = np.array(WEIGHTS) / sum(WEIGHTS) / BLOCKS
    read = ((1 - skipped) @ np.array(curves.plane_bits) * shares).sum()
    assert read == pytest.approx(bits) and ((skipped >= 0) & (skipped <= 1)).all()
    np.testing.assert_allclose(1 - (curves.layer_shares(skipped) * shares).sum(), bits / 8.125)
    assert (curves.thresholds_at(skipped)[skipped == 0] == 0).all()


def test_no_exchange_of_bits_between_planes_is_cheaper():
    """Moving a little from one plane to another never lowers the prediction on the hulls."""
    curves = some_curves(1)
    sizes = np.broadcast_to(np.array(WEIGHTS)[None, :, None] * np.array(curves.plane_bits), (BLOCKS, 7, 4))
    best = curves.predicted(curves.skipped(WEIGHTS, 0.6))
    rng = np.random.default_rng(0)
    for _ in range(50):
        other = np.clip(curves.skipped(WEIGHTS, 0.6) + rng.normal(0, 0.05, sizes.shape), 0, LEVELS[-1])
        if (other * sizes).sum() >= 0.6 * sizes.sum():
            # Interpolated costs lie on or above their hulls.
            assert curves.predicted(other) >= 0.98 * best


def test_more_bits_never_cost_more():
    curves = some_curves(2)
    costs = [curves.predicted(curves.skipped(WEIGHTS, target)) for target in np.linspace(0, 0.95, 20)]
    assert (np.diff(costs) > -1e-9).all() and costs[0] == 0


def test_no_plane_is_read_without_those_above_it():
    gains = jnp.asarray([[1.0, 2.0], [4.0, 0.5]])
    found = np.asarray(plane_thresholds(gains, np.array([1.0, 1.0])))
    np.testing.assert_allclose(found, [[1.0, 0.5], [1.0, 2.0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": LEVELS[::-1].copy()}, "planes.levels: expected shares that ascend"),
        ({"costs": some_curves().costs[..., ::-1].copy()}, "planes.costs: expected finite numbers"),
        ({"thresholds": some_curves().thresholds[:, :, :3]}, r"planes.thresholds: expected the shape \[2, 7, 4, 29\]"),
    ],
)
def test_curves_that_are_none_are_refused(change, message):
    from wisparse_jax.sparsity.planes import check_curves

    check_curves(some_curves(), BLOCKS)
    with pytest.raises(PlanError, match=message):
        check_curves(some_curves()._replace(**change), BLOCKS)


@pytest.fixture(scope="module")
def plan(demo, demo_text):
    settings = dataclasses.replace(
        ws.preset("quick"), absolute_steps=10, skipped_steps=10, heads_steps=10, gradient_tokens=1024,
        statistics_tokens=512,
    )  # fmt: skip
    return ws.calibrate(demo, demo_text["calibration"][:8], bits=3.3, settings=settings)


def test_one_plan_serves_every_number_of_bits(demo, demo_text, plan, tmp_path):
    """KL falls with the bits, is near what was predicted, and far below that of skipping whole channels of int8."""
    assert plan.method == "planes" and plan.planes.format == KIND and plan.bits == pytest.approx(3.3)
    plan.save(tmp_path / "plan")
    loaded = ws.SparsityPlan.load(tmp_path / "plan")
    assert loaded.has_numbers_of(plan)
    asked = {f"{bits}": loaded.at_bits(bits) for bits in (4.3, 3.3, 2.3)}
    assert {name: one.bits for name, one in asked.items()} == pytest.approx({name: float(name) for name in asked})
    models = ws.apply(demo, asked)
    rounded = models["4.3"].params["blocks"][0]["q"]["kernel"]
    assert all(one.params["blocks"][0]["q"]["kernel"] is rounded for one in models.values())
    result = ws.evaluate(demo, demo_text["held_out"][:4], models).sparse
    kl = [result[name].kl.mean for name in asked]
    assert kl[0] < kl[1] / 2 < kl[2] / 4
    for name, value in zip(asked, kl, strict=True):
        skipped = plan.planes.skipped(plan.layer_weights, asked[name].target)
        assert value == pytest.approx(plan.planes.predicted(skipped), rel=0.6)
        assert (1 - result[name].sparsity.mean) * 8.125 == pytest.approx(float(name), abs=0.5)
    assert kl[1] < plan.held_out["uniform"]["kl"] / 5  # of int8 rows those that fit into 3.3 bits


def test_a_row_of_it_counts_the_bytes_of_planes(demo, demo_text, plan):
    """As they are stored the weights of such a plan are its planes, whatever the model's own are."""
    (row,) = compare(demo, {("planes", plan.target): plan}, {"one": demo_text["held_out"][:4]})
    assert row["weights"] == KIND and row["head"] is None and row["basis"] == "plan"
    assert row["megabytes"] == token_bytes(demo.config, KIND, None, row["realised"]) / 1e6
    assert row["megabytes"] < token_bytes(demo.config, None, None, row["realised"]) / 1e6


def test_another_rate_of_the_same_weights_rounds_nothing_again(demo, plan):
    first = ws.apply(demo, plan.at_bits(4.0))
    second = ws.apply(first, plan.at_bits(2.5))
    assert second.params is first.params and second.weights == KIND
    limits = [one.rules[0]["down"].thresholds for one in (first, second)]
    assert (np.asarray(limits[1]) >= np.asarray(limits[0])).all() and (np.asarray(limits[1]) > limits[0]).any()


def test_what_a_plan_for_planes_refuses(demo, plan):
    with pytest.raises(PlanError, match=r"bits = 9: expected .* to 8.125 of int2\+2\+2\+2 weights"):
        plan.at_bits(9.0)
    with pytest.raises(PlanError, match=r"weights = 'int8': the plan is for int2\+2\+2\+2 weights"):
        ws.apply(demo, plan, weights="int8")
    with pytest.raises(WisparseError, match="expected a method for weights in planes, such as planes, found teal"):
        ws.calibrate(demo, np.zeros((4, 32), np.int32), bits=3.0, method="teal")
    other = dataclasses.replace(plan, planes=None)
    with pytest.raises(PlanError, match="expected a plan for planes, found one of planes"):
        other.at_bits(3.0)
    assert FORMATS[KIND].planes == (2, 2, 2, 2)
