"""The losses that a basis is refined on, computed by hand, and what refinement brings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wisparse_jax.calibration import run_dense
from wisparse_jax.calibration.planes import Depth
from wisparse_jax.evaluation import evaluate
from wisparse_jax.models.basis import Basis
from wisparse_jax.search import SearchSettings
from wisparse_jax.search.basis import (
    Moments,
    Skipped,
    SkippedHeads,
    _absolute,
    _some,
    measure_moments,
    refine_basis,
    start_basis,
)
from wisparse_jax.search.judge import sparse_at

KEY = jax.random.key(5)
DEPTHS = (Depth(2.0, 0.3), Depth(4.0, 0.02))
GROUPS, TOKENS, HIDDEN, HEADS = 3, 7, 6, 2


def orthogonal(key, *shape):
    return jnp.linalg.qr(jax.random.normal(key, (*shape, shape[-1])))[0]


def second_moments(key, *shape):
    """Symmetric, positive, and of very unequal channels."""
    rows = jax.random.normal(key, (*shape, shape[-1]))
    rows = rows * jnp.broadcast_to(jnp.logspace(-1, 1, shape[-1]), rows.shape)
    return jnp.swapaxes(rows, -1, -2) @ rows


@pytest.fixture(scope="module")
def moments():
    """Small random ones: three blocks' worth of groups for the stream, of heads two groups of two queries each."""
    keys = jax.random.split(jax.random.key(0), 4)
    return Moments(
        jax.random.normal(keys[0], (GROUPS, TOKENS, HIDDEN)),
        second_moments(keys[1], GROUPS, HIDDEN),
        jax.random.normal(keys[2], (GROUPS, TOKENS, HEADS, 2, 4)),
        second_moments(keys[3], GROUPS, HEADS, 4),
    )


def left(lost, share, depths):
    """What a group's tokens lose, from the energy of each channel `[tokens, channels]`, channel by channel."""
    edge = np.quantile(lost, share)
    price = edge * (1 - depths[0].left) / depths[0].bits if depths else 0.0
    total = 0.0
    for value in lost.ravel():
        if depths:
            total += min([value, *(depth.left * value + price * depth.bits for depth in depths)])
        elif value < edge:
            total += value
    return total / len(lost)


@pytest.mark.parametrize("depths", [(), DEPTHS], ids=["skipping", "planes"])
def test_the_energy_that_the_streams_readers_lose(moments, depths):
    q = orthogonal(jax.random.key(1), HIDDEN)
    chosen, tokens = (np.asarray(part) for part in _some(KEY, GROUPS, TOKENS))
    turn, total = np.asarray(q, np.float64), []
    for g in chosen:
        z = np.asarray(moments.stream[g], np.float64)[tokens] @ turn
        gradient = np.asarray(moments.stream_gradients[g], np.float64)
        weights = np.array([turn[:, i] @ gradient @ turn[:, i] for i in range(HIDDEN)])  # E[u_i^2]
        total.append(left(z**2 * weights, 0.4, depths))
    scale = np.mean([np.trace(gradient) for gradient in np.asarray(moments.stream_gradients)])
    found = Skipped(depths)(q, KEY, jnp.float32(0.4), moments.stream, moments.stream_gradients)
    assert float(found) == pytest.approx(np.mean(total) / scale, rel=1e-4)


@pytest.mark.parametrize("depths", [(), DEPTHS], ids=["skipping", "planes"])
def test_the_energy_that_o_loses(moments, depths):
    """Each key/value group has its own basis, which all its queries share; a token's channels are those of all."""
    r = orthogonal(jax.random.key(2), GROUPS, HEADS, 4)
    chosen, tokens = (np.asarray(part) for part in _some(KEY, GROUPS, TOKENS))
    total = []
    for b in chosen:
        lost = np.zeros((len(tokens), HEADS, 2, 4))
        for k in range(HEADS):
            turn, gradient = (np.asarray(part[b, k], np.float64) for part in (r, moments.head_gradients))
            weights = np.array([turn[:, i] @ gradient @ turn[:, i] for i in range(4)])
            lost[:, k] = (np.asarray(moments.heads[b, :, k], np.float64)[tokens] @ turn) ** 2 * weights
        total.append(left(lost.reshape(len(tokens), -1), 0.4, depths))
    scale = np.mean([np.trace(np.asarray(moments.head_gradients[b, k])) for b in range(GROUPS) for k in range(HEADS)])
    found = SkippedHeads(depths)(r, KEY, jnp.float32(0.4), moments.heads, moments.head_gradients)
    assert float(found) == pytest.approx(np.mean(total) / scale, rel=1e-4)


def test_the_mean_absolute_value_weighs_groups_by_their_gradients(moments):
    q, energy = orthogonal(jax.random.key(1), HIDDEN), np.array([1.0, 4.0, 16.0])
    chosen, tokens = (np.asarray(part) for part in _some(KEY, GROUPS, TOKENS))
    means = [np.abs(np.asarray(moments.stream[g])[tokens] @ np.asarray(q)).mean() for g in chosen]
    expected = np.mean([mean * np.sqrt(energy[g] / 7) for g, mean in zip(chosen, means, strict=True)])
    found = _absolute(q, KEY, jnp.float32(0.0), moments.stream, jnp.asarray(energy, jnp.float32))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def on_all(loss, basis, *data, draws=64):
    """A loss on as good as all data: the mean over many draws of tokens, the same for every basis."""
    keys = jax.random.split(jax.random.key(9), draws)
    return float(jnp.mean(jax.vmap(lambda key: loss(basis, key, jnp.float32(0.5), *data))(keys)))


@pytest.fixture(scope="module")
def found(demo, demo_text):
    """On the demo model: what the losses need, and eigenvectors and the refined basis."""
    run = run_dense(demo, demo_text["calibration"][:4, :256], SearchSettings(sparse_share=0.9))
    moments = measure_moments(run, 512, seed=0)
    start = start_basis(moments)
    made, _ = refine_basis(moments, start, 0.5, (40, 60, 40), 0.01, seed=0)
    return moments, start, made


def test_refinement_lowers_both_losses_on_all_data(found):
    moments, start, made = found
    of_stream = Skipped(()), moments.stream, moments.stream_gradients
    of_heads = SkippedHeads(()), moments.heads, moments.head_gradients
    for name, (loss, *data), least in (("stream", of_stream, 0.9), ("heads", of_heads, 0.97)):
        before, after = (on_all(loss, getattr(basis, name), *data) for basis in (start, made))
        assert after < least * before, (name, before, after)


@pytest.mark.parametrize("name", ["stream", "heads"])
def test_both_rotations_are_found_and_stay_rotations(found, name):
    _, start, made = found
    before, after = getattr(start, name), getattr(made, name)
    eye = np.broadcast_to(np.eye(before.shape[-1]), before.shape)
    for basis in (before, after):
        np.testing.assert_allclose(jnp.swapaxes(basis, -1, -2) @ basis, eye, atol=1e-4)
        assert np.abs(basis - eye).mean() > 0.5 / before.shape[-1]
    turned = np.linalg.norm(np.asarray(after - before), axis=(-2, -1)) / np.sqrt(before.shape[-1])
    assert turned.min() > 0.01  # every key/value group's own, too


def test_the_streams_rotation_helps_alone_and_beside_the_heads(found, demo, demo_text):
    """KL of half of the channels skipped, uniform, by magnitude, on other text than the basis was found on."""
    _, _, made = found
    windows = demo_text["held_out"][:6, :256]
    eye = Basis(jnp.eye(made.stream.shape[-1]), jnp.broadcast_to(jnp.eye(made.heads.shape[-1]), made.heads.shape))
    choices = {"none": eye, "stream": eye._replace(stream=made.stream), "heads": eye._replace(heads=made.heads)}
    models = {}
    for name, basis in (choices | {"both": made}).items():
        run = run_dense(demo, windows, basis=basis)
        shape = (demo.config.num_blocks, 7)
        models[name] = sparse_at(run, np.zeros(shape), np.full(shape, 0.5))
    result = evaluate(demo, windows, models)
    # What the heads' rotation brings is within the error of so little text; that it lowers its loss is tested above.
    for better, worse in (("stream", "none"), ("both", "heads")):
        gap = result.paired(better, worse)
        assert gap.mean < -2 * gap.error < 0, (better, worse, gap)
