"""What the method promises, on the trained demo model: the order of the methods, and the sparsity asked for."""

from pathlib import Path

import jax
import numpy as np
import pytest

from wisparse_jax.evaluation import evaluate
from wisparse_jax.models.loading import model_fingerprint
from wisparse_jax.report.demo import SETTINGS
from wisparse_jax.search import run_dense, search_plan
from wisparse_jax.sparsity import METHODS, apply

pytestmark = pytest.mark.long

# What the demo model wrote in `sample_windows(demo, 16, 512, seed=0)` and `sample_windows(demo, 48, 512, seed=1)`: to
# write it again takes as long as a search.
TEXT = Path(__file__).parent / "fixtures" / "demo_text.npz"


@pytest.fixture(scope="module")
def results(demo):
    """Every method with the demo's search, on text of the model's own and on other such text."""
    with np.load(TEXT) as file:
        text, held_out = (file[name].astype(np.int32) for name in ("calibration", "held_out"))
    calibration = run_dense(demo.config, demo.params, text, SETTINGS, seed=0)
    jax.block_until_ready(calibration.hidden)
    fingerprint = model_fingerprint(demo)
    plans = {name: search_plan(calibration, fingerprint, 0.5, name, 0, SETTINGS) for name in METHODS}
    return plans, evaluate(demo, held_out, {name: apply(demo, plan) for name, plan in plans.items()})


def test_the_order_of_the_methods(results):
    """Paired over windows, by more than two standard errors."""
    _, evaluation = results
    for better, worse in (("wisparse", "teal"), ("teal", "wina"), ("teal", "uniform"), ("wisparse", "wina")):
        gap = evaluation.paired(better, worse)
        assert gap.mean < -2 * gap.error < 0, (better, worse, gap)


def test_sparse_models_predict_worse_than_the_dense_one_but_still_predict(results):
    _, evaluation = results
    dense = evaluation.dense.perplexity.mean
    for name, score in evaluation.sparse.items():
        assert dense < score.perplexity.mean < 2 * dense, name


def test_realised_sparsity_is_what_was_asked_for(results):
    plans, evaluation = results
    for name, score in evaluation.sparse.items():
        assert plans[name].mean_sparsity == pytest.approx(0.5, abs=1e-9)
        assert abs(score.sparsity.mean - 0.5) < 0.02, name
