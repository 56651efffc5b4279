"""What the method promises, on the trained demo model: the order of the methods, and the sparsity asked for."""

import jax
import pytest

from wisparse_jax.evaluation import evaluate
from wisparse_jax.models.loading import model_fingerprint
from wisparse_jax.report.demo import SETTINGS
from wisparse_jax.search import run_dense, search_plan
from wisparse_jax.sparsity import METHODS, apply

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def results(demo, demo_text):
    """Every method with the demo's search, on text of the model's own and on other such text."""
    calibration = run_dense(demo.config, demo.params, demo_text["calibration"], SETTINGS, seed=0)
    jax.block_until_ready(calibration.hidden)
    fingerprint = model_fingerprint(demo)
    plans = {name: search_plan(calibration, fingerprint, 0.5, name, 0, SETTINGS) for name in METHODS}
    return plans, evaluate(demo, demo_text["held_out"], {name: apply(demo, plan) for name, plan in plans.items()})


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
