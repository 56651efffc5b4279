"""Thresholds set along the sparse run: a plan keeps its word on the text that they are set on, ties or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wisparse_jax.calibration import run_dense, sparse_run
from wisparse_jax.calibration.sparse_run import sparse_thresholds
from wisparse_jax.evaluation.quality import _sparse
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.model import Model
from wisparse_jax.search import SearchSettings
from wisparse_jax.sparsity.apply import threshold_rules, with_biases
from wisparse_jax.testing import tiny_config, tiny_model

CONFIG = {"hidden_size": 64, "head_dim": 16}


def dead_channels(params):
    """40 of the 64 channels of the stream are always 0: norm gains of 0."""
    for block in params["blocks"]:
        for norm in ("attn_norm", "mlp_norm"):
            block[norm] = block[norm].at[:40].set(0.0)


def constant_layers(params):
    """What a layer reads is the same for every token: the products before it are all 0, so all scores tie."""
    for block in params["blocks"]:
        block["v"] = {"kernel": jnp.zeros_like(block["v"]["kernel"])}
        block["up"] = {"kernel": jnp.zeros_like(block["up"]["kernel"])}


def zero_rows(params):
    """Half the rows of every weight are 0: with exponents their scores fall to the floor."""
    for block in params["blocks"]:
        for name in LAYERS:
            block[name] = {"kernel": block[name]["kernel"].at[::2].set(0.0)}


def saturated(params):
    """All channels of the stream have one size, and a hundred tokens are one."""
    params["embed"] = jnp.sign(params["embed"])
    for block in params["blocks"]:
        for name in ("o", "down"):
            block[name] = {"kernel": jnp.zeros_like(block[name]["kernel"])}


CASES = {"plain": lambda params: None} | {f.__name__: f for f in (dead_channels, constant_layers, zero_rows, saturated)}


def realised(calibration, rules):
    """By the evaluation's own program on the same windows after the same dense start, by layer."""
    config, first = calibration.config, calibration.dense_positions
    # One token more, which is not scored, so that the calibration's last position is.
    ids = jnp.pad(jnp.asarray(calibration.windows), ((0, 0), (0, 1)))
    vocabulary = jnp.zeros((*calibration.tokens.shape, config.vocab_size))
    caches = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 1), (0, 0), (0, 0))), calibration.caches)
    *_, by_token, by_layer = _sparse(config, first, calibration.params, ids, vocabulary, caches, rules)
    return np.asarray(by_layer, np.float64).mean(axis=0), float(by_token.mean())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_what_is_realised_is_what_is_said(name, exponent):
    config = tiny_config(**CONFIG)
    params = tiny_model(config).params
    CASES[name](params)
    model = Model(config, params)
    tokens = jax.random.randint(jax.random.key(1), (4, 48), 0, config.vocab_size)
    calibration = run_dense(model, tokens)
    exponents = np.full((3, 7), exponent)
    sparsities = np.random.default_rng(0).uniform(0.2, 0.8, (3, 7))
    found = sparse_thresholds(calibration, exponents, sparsities)
    assert np.isfinite(found.values).all() and (found.values >= 0).all()
    by_layer, mean = realised(calibration, threshold_rules(calibration.gains, exponents, found.values))
    weights = np.asarray(config.layer_weights) / sum(config.layer_weights)
    assert abs(mean - (found.realised @ weights).mean()) < 0.002
    np.testing.assert_allclose(by_layer, found.realised, atol=0.004)
    if name == "plain":
        np.testing.assert_allclose(found.realised, sparsities, atol=0.002)
    if name == "dead_channels":
        # Dead channels are skipped at least; where more is asked for, as much as is asked.
        readers = [i for i, layer in enumerate(LAYERS) if layer not in ("o", "down")]
        wanted = np.maximum(sparsities[:, readers], 40 / 64)
        np.testing.assert_allclose(found.realised[:, readers], wanted, atol=0.002)
    if name == "constant_layers":
        assert (found.realised[:, [3, 6]] == 1).all()  # o and down read nothing but zeros


def test_biases_change_what_later_layers_meet(tiny_model, tiny_tokens):
    calibration = run_dense(tiny_model, tiny_tokens)
    shapes = calibration.config.layer_shapes
    biases = [{n: 0.5 * jax.random.normal(jax.random.key(b), shapes[n][1:]) for n in LAYERS} for b in range(3)]
    exponents, sparsities = np.zeros((3, 7)), np.full((3, 7), 0.5)
    plain, biased = (sparse_thresholds(calibration, exponents, sparsities, own) for own in (None, biases))
    assert plain.values[0, 0] == biased.values[0, 0] and (np.abs(plain.values - biased.values)[1:] > 1e-4).all()
    rules = with_biases(threshold_rules(calibration.gains, exponents, biased.values), biases)
    np.testing.assert_allclose(realised(calibration, rules)[0], 0.5, atol=0.004)


def test_a_sparsity_of_zero_keeps_everything(tiny_model, tiny_tokens):
    found = sparse_thresholds(run_dense(tiny_model, tiny_tokens), np.ones((3, 7)), np.zeros((3, 7)))
    assert (found.values == 0).all() and (found.realised == 0).all()


def test_many_scores_are_sampled_evenly(tiny_model, tiny_tokens, monkeypatch):
    from wisparse_jax.calibration.statistics import spaced_tokens

    found = [
        spaced_tokens(*size).step for size in ((1024, 1024), (4096, 257), (4096, 1024), (4096, 14336), (1000, 14336))
    ]
    assert found == [1, 2, 4, 4, 1]  # as few as 2^20 scores, but 1,024 tokens at least
    calibration = run_dense(tiny_model, tiny_tokens, SearchSettings())
    exponents, sparsities = np.zeros((3, 7)), np.full((3, 7), 0.5)
    monkeypatch.setattr(sparse_run, "spaced_tokens", lambda tokens, channels: slice(None, None, 2))
    jax.clear_caches()
    found = sparse_thresholds(calibration, exponents, sparsities)
    jax.clear_caches()
    by_layer, _ = realised(calibration, threshold_rules(calibration.gains, exponents, found.values))
    np.testing.assert_allclose(by_layer, 0.5, atol=0.1)
