"""Scores and biases trained on KL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.weight import Weight
from wisparse_jax.calibration import run_dense
from wisparse_jax.calibration.dense import run_dense_on
from wisparse_jax.models.config import LAYERS
from wisparse_jax.search import SearchSettings
from wisparse_jax.search.training import _SoftRule, start_of, train


@pytest.fixture(scope="module")
def layer():
    key = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(key[0], (3, 16, 40))
    log_gains = jax.random.normal(key[1], (40,)) / 2
    return inputs, log_gains, Weight(jax.random.normal(key[2], (40, 8)))


def test_the_pass_forward_skips_the_lowest_scores(layer):
    inputs, log_gains, weight = layer
    rule = _SoftRule(log_gains, jnp.float32(0.4), jnp.zeros(8))
    scores = np.abs(inputs) * np.exp(log_gains)
    kept = np.where(scores > np.quantile(scores, 0.4), inputs, 0.0)
    np.testing.assert_allclose(rule.product(inputs, weight), kept @ np.asarray(weight.values), rtol=1e-5, atol=1e-5)


def test_gains_that_all_grow_alike_change_nothing(layer):
    """The threshold moves with them, so that the choice has no slope in that direction; in others it has."""
    inputs, log_gains, weight = layer
    target = jax.random.normal(jax.random.key(4), (3, 16, 8))

    def loss(log_gains):
        product = _SoftRule(log_gains, jnp.float32(0.4), jnp.zeros(8)).product(inputs, weight)
        return jnp.mean(jnp.square(product - target))

    slope = np.asarray(jax.grad(loss)(log_gains))
    assert abs(slope.sum()) < 1e-4 * np.abs(slope).sum() and np.abs(slope).max() > 1e-3


@pytest.fixture(scope="module")
def runs(tiny_model, tiny_tokens):
    settings = SearchSettings(statistics_tokens=64)
    training = run_dense(tiny_model, tiny_tokens[:3], settings)
    return training, run_dense_on(training, tiny_tokens[3:], settings, 0)


@pytest.mark.parametrize("part", ["log_gains", "biases"])
def test_each_part_alone_lowers_kl(runs, part):
    """Judged on the windows that it learns from: tiny random models have nothing to generalise."""
    training, _ = runs
    shape = (training.config.num_blocks, len(LAYERS))
    start = start_of(training, np.ones(shape))
    rates = (0.02, 0.0) if part == "log_gains" else (0.0, 0.005)
    found, curve = train(training, training, start, np.full(shape, 0.5), 12, 72, 4, rates, seed=0)
    mean = curve.mean(axis=1)
    assert curve.shape == (4, 3) and mean.min() < 0.99 * mean[0]
    moved = {
        name: max(float(jnp.max(jnp.abs(a[n] - b[n]))) for a, b in zip(*rows, strict=True) for n in LAYERS)
        for name, rows in zip(start._fields, zip(start, found, strict=True), strict=True)
    }
    other = "biases" if part == "log_gains" else "log_gains"
    assert moved[part] > 1e-3 and moved[other] == 0


def test_the_best_that_was_met_on_held_out_windows_comes_back(runs):
    """Steps that only harm leave things as they were, and end before their number is up."""
    training, held_out = runs
    shape = (training.config.num_blocks, len(LAYERS))
    start = start_of(training, np.zeros(shape))
    found, curve = train(training, held_out, start, np.full(shape, 0.5), 40, 72, 2, (0.0, 10.0), seed=0)
    mean = curve.mean(axis=1)
    assert mean[0] == mean.min() and len(curve) == 5  # the start, and as many looks as patience has
    assert all(not np.asarray(row[name]).any() for row in found.biases for name in LAYERS)


def test_a_last_batch_is_filled_up_with_other_windows(tiny_model, tiny_tokens):
    """Thresholds are those of the batch: copies of its last window would make them that window's own."""
    settings = SearchSettings(statistics_tokens=64)
    training = run_dense(tiny_model, tiny_tokens[:2], settings)  # windows of 24 sparse positions, two a batch
    shape = (training.config.num_blocks, len(LAYERS))

    def looks(*windows):
        held_out = run_dense_on(training, tiny_tokens[np.array(windows)], settings, 0)
        start = start_of(training, np.ones(shape))
        return train(training, held_out, start, np.full(shape, 0.5), 0, 48, 1, (0.0, 0.0), seed=0)[1][0]

    three = looks(0, 1, 2)
    np.testing.assert_allclose(three, [*looks(0, 1), looks(2, 0)[0]], rtol=1e-5)
    assert abs(three[2] / looks(2, 2)[0] - 1) > 1e-3
