"""Rounding that makes up for its errors: right to the letter on one layer, and worth it on a trained model."""

import jax.numpy as jnp
import numpy as np
import pytest

import wisparse_jax as ws
from kernels_pallas.formats import FORMATS
from kernels_pallas.weight import Weight
from wisparse_jax.models import compensate
from wisparse_jax.models.compensate import compensated, compensated_params
from wisparse_jax.models.forward import hidden_states, layout
from wisparse_jax.models.quantise import rounded
from wisparse_jax.testing import normal, tiny_config, tiny_model


def correlated(rows=400, channels=96):
    """Inputs of which each is a mixture of all."""
    return normal(1, rows, channels) @ (jnp.eye(channels) + 0.3 * normal(2, channels, channels))


def one(kernel, gram):
    return compensated([kernel], gram, "int4")[0]


def test_it_is_the_textbook_algorithm():
    """Channel by channel in float64, the inverse Gram matrix updated by elimination, for 70 channels: two batches."""
    x, kernel = np.asarray(correlated(300, 70), np.float64), np.asarray(normal(0, 70, 160), np.float64)
    gram = x.T @ x
    damped = gram + compensate.DAMPING * np.mean(np.diag(gram)) * np.eye(70)
    inverse, left = np.linalg.inv(damped), kernel.copy()
    expected = np.zeros_like(kernel)
    for i in range(70):
        numbers, scales = FORMATS["int4"].nearest(jnp.asarray(left[i], jnp.float32))
        expected[i] = np.asarray(numbers) * np.repeat(scales, 128)[:160]
        left -= np.outer(inverse[i], (left[i] - expected[i]) / inverse[i, i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    found = one(jnp.asarray(kernel, jnp.float32), jnp.asarray(gram, jnp.float32)).wide()
    # What lies within rounding of the middle between two numbers may become either.
    assert np.mean(np.abs(found - expected) > 1e-3 * np.abs(kernel).max()) < 0.01
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(kernel)


def test_outputs_change_less_than_by_rounding_to_the_nearest():
    x, kernel = correlated(), normal(0, 96, 160)
    error = [jnp.linalg.norm(x @ (w.wide() - kernel)) for w in (one(kernel, x.T @ x), rounded(kernel, "int4"))]
    assert error[0] < 0.75 * error[1]


def test_inputs_that_tell_nothing_of_each_other_give_the_nearest():
    kernel, gram = normal(0, 70, 160), jnp.diag(jnp.arange(70.0))
    found, expected = one(kernel, gram), rounded(kernel, "int4")
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.scales, expected.scales)


def test_layers_are_rounded_by_what_the_rounded_model_makes_them_read(monkeypatch):
    """Two windows at a time; the first layer reads what it always read, later ones are fitted to old outputs."""
    model = tiny_model(tiny_config(num_blocks=2, windows=(None, None)))
    config, tokens = model.config, np.random.default_rng(0).integers(0, 97, (6, 32)).astype(np.int32)
    monkeypatch.setattr(compensate, "TOKENS_AT_ONCE", 64)
    params = compensated_params(config, model.params, "int4", tokens)

    def inputs(params):
        records = []
        hidden_states(config, params, jnp.asarray(tokens), layout(config, 6, 32), records=records)
        return [{n: r[n].reshape(-1, r[n].shape[-1]) for n in r} for r in records]

    own, original = inputs(params), inputs(model.params)
    for b, name in ((0, "q"), (0, "down"), (1, "gate")):
        x, y, kernel = own[b][name], original[b][name], model.params["blocks"][b][name]["kernel"]
        gram, crossed = x.T @ x, x.T @ y
        ridge = gram + compensate.TARGET_DAMPING * jnp.mean(jnp.diagonal(gram)) * jnp.eye(len(gram))
        target = kernel + jnp.linalg.solve(ridge, (crossed - gram) @ kernel)
        assert (b == 0 and name == "q") or float(jnp.abs(target - kernel).max()) > 1e-3
        found, expected = Weight.of(params["blocks"][b][name]).wide(), one(target, gram).wide()
        # Products in another order: what lies within rounding of the middle between two numbers may become either.
        assert np.mean(np.abs(found - expected) > 1e-3 * np.abs(kernel).max()) < 0.05, (b, name)


def test_a_trained_layer_changes_less_on_other_text(demo, demo_text):
    """The q projection of the demo's fourth block, rounded by four windows and measured on four others."""

    def read(tokens):
        records = []
        hidden_states(demo.config, demo.params, tokens, layout(demo.config, *tokens.shape), records=records)
        return records[3]["q"].reshape(-1, demo.config.hidden_size)

    x, held_out = (read(jnp.asarray(demo_text[name][:4])) for name in ("calibration", "held_out"))
    kernel = demo.params["blocks"][3]["q"]["kernel"]
    error = [jnp.linalg.norm(held_out @ (w.wide() - kernel)) for w in (one(kernel, x.T @ x), rounded(kernel, "int4"))]
    assert error[0] < 0.8 * error[1]


def test_only_int4_is_rounded_by_a_text(tiny_model, tiny_tokens):
    with pytest.raises(ws.WisparseError, match="weights = 'int8': expected int4 where a text is given"):
        ws.quantise(tiny_model, "int8", tokens=tiny_tokens)
    with pytest.raises(ws.WisparseError, match="rounded to integers already"):
        ws.quantise(ws.quantise(tiny_model, "int4"), "int4", tokens=tiny_tokens)
    with pytest.raises(ws.WisparseError, match="tokens: token id 97 is outside the vocabulary"):
        ws.quantise(tiny_model, "int4", tokens=np.full((1, 8), 97))
