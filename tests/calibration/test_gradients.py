"""Second-order costs: against a computation by hand, and against the KL that they predict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wisparse_jax.calibration import gradients, run_dense
from wisparse_jax.calibration.gradients import GAIN_FLOOR, gradient_gains, layer_costs, walk_gradients
from wisparse_jax.calibration.sparse_run import sparse_thresholds
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.forward import head, hidden_states, layout
from wisparse_jax.models.rules import ChannelRule
from wisparse_jax.search import SearchSettings
from wisparse_jax.search.losses import KLLoss
from wisparse_jax.search.problem import BudgetProblem
from wisparse_jax.testing import tiny_config, tiny_model


@pytest.fixture(scope="module")
def calibration(tiny_tokens):
    """Of a model whose norms, biases and grouping a mistake would show in."""
    config = tiny_config(qkv_bias=True, o_bias=True, mlp_bias=True, windows=(None, 5, None))
    model = tiny_model(config)
    leaves, tree = jax.tree.flatten(model.params)
    made = [w + 0.2 * jax.random.normal(jax.random.key(i), w.shape) if w.ndim == 1 else w for i, w in enumerate(leaves)]
    return run_dense(type(model)(config, jax.tree.unflatten(tree, made)), tiny_tokens)


def by_hand(calibration, b, name, seed, draw):
    """Every window alone: inputs of the layer, and gradients of log p of the same labels with respect to its output."""
    config, params, first = calibration.config, calibration.params, calibration.dense_positions
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), draw), 0)
    keys = jax.random.split(key, len(calibration.tokens))
    where, out = layout(config, 1, calibration.tokens.shape[1], first), []

    def run(moved, tokens, cache):
        rules = [{n: ChannelRule(None) for n in LAYERS} for _ in params["blocks"]]
        rules[b][name] = ChannelRule(None, moved)
        records = []
        hidden, _ = hidden_states(config, params, tokens[None], where, cache, rules, records)
        return head(params, hidden)[0], records[b][name][0]

    for row, key in enumerate(keys):
        cache = jax.tree.map(lambda a: a[row : row + 1], calibration.caches)  # noqa: B023
        zero = jnp.zeros((1, calibration.tokens.shape[1], config.layer_shapes[name][1]))
        logits, x = run(zero, calibration.tokens[row], cache)
        labels = jax.random.categorical(key, logits)

        def log_p(moved):
            found = jax.nn.log_softmax(run(moved, calibration.tokens[row], cache)[0])  # noqa: B023
            return jnp.sum(jnp.take_along_axis(found, labels[:, None], axis=1))  # noqa: B023

        out.append((x, jax.grad(log_p)(zero)[0]))
    return tuple(np.concatenate([np.asarray(pair[i], np.float64) for pair in out]) for i in (0, 1))


@pytest.mark.parametrize(("b", "name"), [(0, "v"), (1, "o"), (2, "down")])
def test_the_cost_of_a_layer_is_that_of_its_errors_against_its_gradients(calibration, b, name):
    """`E[(g . ((x skipped) W))^2] / 2`, with the gradients of `jax.grad` and the errors written out."""
    x, gradient = by_hand(calibration, b, name, 5, draw=1)
    levels, exponents = np.array([0.0, 0.3, 0.6, 0.9]), np.full((3, 7), 0.5)
    found = layer_costs(calibration, exponents, levels, calibration.tokens.size, 5)[b, LAYERS.index(name)]
    weight = np.asarray(calibration.params["blocks"][b][name]["kernel"], np.float64)
    score = np.abs(x) * np.maximum(np.linalg.norm(weight, axis=1) ** 0.5, 1e-4)
    assert found[0] == 0 and found[1] < found[2] < found[3]
    for level, cost in zip(levels, found, strict=True):
        # A threshold of the table is itself a score, which rounding keeps or skips.
        threshold = calibration.statistics[b].threshold(name, 0.5, level) * np.array([1 - 1e-6, 1 + 1e-6])
        skipped = [np.where(score < one, x, 0) @ weight for one in threshold]
        expected = [0.5 * np.mean(np.sum(gradient * error, axis=1) ** 2) for error in skipped]
        assert min(abs(cost - one) for one in expected) <= 2e-3 * cost


def test_gains_are_the_root_mean_square_of_the_gradients(calibration):
    found = gradient_gains(calibration, calibration.tokens.size, 5)[1]["o"]
    _, gradient = by_hand(calibration, 1, "o", 5, draw=0)
    square = np.mean((gradient @ np.asarray(calibration.params["blocks"][1]["o"]["kernel"]).T) ** 2, axis=0)
    np.testing.assert_allclose(found, np.sqrt(square / square.mean() + GAIN_FLOOR), rtol=1e-3)


def test_windows_are_walked_in_parts_and_again_for_more_tokens(calibration, monkeypatch):
    positions = calibration.tokens.shape[1]
    monkeypatch.setattr(gradients, "TOKENS_AT_ONCE", 2 * positions)
    walked = [(b, made.gradients["q"].shape) for b, made in walk_gradients(calibration, 5 * positions, 0)]
    assert walked == [(b, (2 * positions, 32)) for _ in range(3) for b in (2, 1, 0)]
    first, again = (
        [made.gradients["down"] for b, made in walk_gradients(calibration, 6 * positions, 0) if b == 2][i]
        for i in (0, 2)
    )
    assert not np.array_equal(first, again)  # the same windows with other labels


def test_costs_of_a_dead_layer_are_zero(tiny_model, tiny_tokens):
    """Nothing is divided by nothing where a layer's output is not read."""
    params = tiny_model.params
    blocks = list(params["blocks"])
    blocks[1] = blocks[1] | {"down": {"kernel": jnp.zeros_like(blocks[1]["down"]["kernel"])}}
    calibration = run_dense(type(tiny_model)(tiny_model.config, params | {"blocks": blocks}), tiny_tokens)
    gains = gradient_gains(calibration, 96, 0)
    assert all(np.isfinite(gain).all() and (gain > 0).all() for row in gains for gain in row.values())
    costs = layer_costs(calibration, np.ones((3, 7)), np.array([0.0, 0.5, 0.9]), 96, 0)
    assert np.isfinite(costs).all() and (costs[1, [4, 5, 6]] == 0).all() and (costs[0, :, 2] > 0).all()


@pytest.mark.long
def test_costs_predict_the_kl_of_plans(demo, demo_text):
    """Within 25 % for random plans of little sparsity on the trained model, and in their order."""
    settings = SearchSettings(gradient_tokens=2048, statistics_tokens=2048, block_tokens=2048)
    calibration = run_dense(demo, demo_text["calibration"][:8], settings)
    problem = BudgetProblem(calibration, np.zeros((8, 7)), settings, 0, target=0.2)
    rng = np.random.default_rng(0)
    plans = [np.clip(rng.uniform(0.1, 0.3) + rng.uniform(-0.1, 0.1, (8, 7)), 0, 1) for _ in range(6)]
    thresholds = [sparse_thresholds(calibration, problem.exponents, plan).values for plan in plans]
    measured = KLLoss(calibration, 2048, 3)(problem.exponents, np.stack(thresholds))
    predicted = np.array([problem.predicted(plan) for plan in plans])
    assert np.abs(predicted / measured - 1).max() < 0.25, (predicted, measured)
    assert np.corrcoef(predicted, measured)[0, 1] > 0.95
