"""Masks that several sequences share: alone a sequence's own, and those that are alike lose nothing by sharing."""

import numpy as np
import pytest
from shared_masks import measure, scaled

import wisparse_jax as ws
from wisparse_jax.calibration import SearchSettings
from wisparse_jax.calibration.dense import run_dense, run_dense_on


@pytest.fixture(scope="module")
def plan(tiny_model, tiny_tokens):
    return ws.calibrate(tiny_model, tiny_tokens, 0.5, "wina", settings=SearchSettings(compare_teal=False))


def test_alone_it_is_the_plan(tiny_model, tiny_tokens, plan):
    calibration = run_dense(tiny_model, tiny_tokens, SearchSettings())
    kl, share = measure(calibration, calibration, plan, 0.5, 1)
    score = ws.evaluate(tiny_model, tiny_tokens, {"plan": ws.apply(tiny_model, plan)}).sparse["plan"]
    # Other thresholds than the plan's own, which are not from all windows; and one position more is scored.
    assert abs(share - 0.5) < 0.01 and abs(kl.mean - score.divergence.mean) < 0.25 * kl.mean


def test_sequences_that_differ_lose_by_sharing(tiny_model, tiny_tokens, plan):
    alike = np.repeat(np.asarray(tiny_tokens)[:1], 4, axis=0)
    calibration = run_dense(tiny_model, tiny_tokens, SearchSettings())
    same = run_dense_on(calibration, alike, SearchSettings(), 0)
    (alone, _), (shared, _) = (measure(calibration, calibration, plan, 0.5, n) for n in (1, 4))
    (one, _), (two, _) = (measure(same, same, plan, 0.5, n) for n in (1, 2))
    assert shared.mean > 1.1 * alone.mean
    assert abs(one.mean - two.mean) < 1e-5 * one.mean + 1e-6


def test_budgets_scale_to_another_mean(plan):
    weights = np.asarray(plan.layer_weights) / sum(plan.layer_weights)
    for sparsity in (0.2, 0.35, 0.8):
        table = scaled(plan, sparsity)
        assert abs((table @ weights).mean() - sparsity) < 1e-6 and table.max() <= 0.99
