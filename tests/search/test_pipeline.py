import dataclasses

import numpy as np
import pytest

from wisparse_jax.errors import WisparseError
from wisparse_jax.search import SearchSettings, calibrate
from wisparse_jax.sparsity import METHODS

QUICK = SearchSettings(
    exponent_step=0.75, exponent_passes=1, population=4, generations=2, layer_step=0.2, statistics_tokens=64
)


@pytest.fixture(scope="module")
def plans(tiny_model, tiny_tokens):
    return {name: calibrate(tiny_model, tiny_tokens, 0.5, name, settings=QUICK) for name in METHODS}


def test_every_method_meets_the_target_exactly(plans):
    for plan in plans.values():
        assert plan.mean_sparsity == pytest.approx(0.5, abs=1e-12)
        assert plan.sparsities.min() >= 0 and plan.sparsities.max() <= 0.95


def test_methods_differ_as_defined(plans):
    assert (plans["uniform"].exponents == 0).all() and (plans["uniform"].sparsities == 0.5).all()
    assert (plans["wina"].exponents == 1).all() and (plans["wina"].sparsities == 0.5).all()
    teal = plans["teal"]
    weights = np.asarray(teal.layer_weights) / sum(teal.layer_weights)
    assert (teal.exponents == 0).all() and np.ptp(teal.sparsities, axis=1).max() > 0
    np.testing.assert_allclose(teal.sparsities @ weights, 0.5)  # TEAL spreads inside blocks alone
    assert set(plans["wisparse"].timings) == {
        "statistics",
        "exponents",
        "block budgets",
        "layer budgets",
        "final exponents",
        "thresholds",
    }


def test_same_seed_same_plan(plans, tiny_model, tiny_tokens):
    again = calibrate(tiny_model, tiny_tokens, 0.5, "wisparse", settings=QUICK)
    for name in ("exponents", "sparsities", "thresholds"):
        np.testing.assert_array_equal(getattr(again, name), getattr(plans["wisparse"], name))


@pytest.mark.parametrize(
    ("off", "stages"),
    [
        ("search_exponents", {"exponents", "final exponents"}),
        ("search_blocks", {"block budgets"}),
        ("search_layers", {"layer budgets"}),
    ],
)
def test_a_stage_that_is_switched_off_does_not_run(tiny_model, tiny_tokens, off, stages):
    plan = calibrate(tiny_model, tiny_tokens, 0.5, settings=dataclasses.replace(QUICK, **{off: False}))
    assert not stages & set(plan.timings)
    assert plan.mean_sparsity == pytest.approx(0.5, abs=1e-12)


def test_zero_sparsity_is_the_dense_model(tiny_model, tiny_tokens):
    import wisparse_jax as ws

    plan = ws.calibrate(tiny_model, tiny_tokens, sparsity=0.0, settings=QUICK)
    np.testing.assert_allclose(ws.apply(tiny_model, plan)(tiny_tokens), tiny_model(tiny_tokens), atol=1e-5)


BAD = {
    "method": (dict(method="magic"), "method = 'magic': expected one of wisparse, teal, wina, uniform"),
    "sparsity": (dict(sparsity=1.2), "sparsity = 1.2: expected a number from 0 to 0.95"),
    "nan": (dict(sparsity=float("nan")), "sparsity = nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(tiny_model, tiny_tokens, name):
    arguments, message = BAD[name]
    with pytest.raises(WisparseError, match=message):
        calibrate(tiny_model, tiny_tokens, **arguments)


def test_tokens_that_the_model_cannot_read_are_refused(tiny_model, tiny_tokens, tiny_config):
    with pytest.raises(WisparseError, match=f"outside the vocabulary of {tiny_config.vocab_size}"):
        calibrate(tiny_model, np.asarray(tiny_tokens) + tiny_config.vocab_size)
    with pytest.raises(WisparseError, match="longer than the model's context"):
        calibrate(tiny_model, np.zeros((1, tiny_config.context + 1), np.int32))
    with pytest.raises(WisparseError, match="at least one window"):
        calibrate(tiny_model, np.zeros((0, 8), np.int32))
