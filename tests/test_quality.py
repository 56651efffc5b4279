"""What the methods promise, on the trained demo model: their order, and the sparsity asked for, in `wisparse demo`."""

import dataclasses
import json

import pytest

from wisparse_jax.report import demo as program
from wisparse_jax.search import METHODS, SearchSettings

pytestmark = pytest.mark.long

SETTINGS = SearchSettings(
    compare_teal=False,
    statistics_tokens=1_024,
    absolute_steps=40,
    skipped_steps=60,
    heads_steps=20,
    gradient_tokens=2_048,
    training_steps=8,
    training_every=8,
    training_tokens=1_024,
    exponent_step=0.5,
    exponent_passes=1,
    exponent_tokens=128,
    population=8,
    generations=4,
    paper_generations=3,
    paper_offspring=4,
    block_tokens=256,
    layer_step=0.1,
    layer_tokens=128,
)


@pytest.fixture(scope="module")
def results(demo_text, tmp_path_factory):
    """The demo with every method, searches cut short, and text of the model's own that was written before."""
    # Half windows: the block searches read a window each at least.
    windows = {name: ids[:, : ids.shape[1] // 2] for name, ids in demo_text.items()}
    text = {program.CALIBRATION_SEED: windows["calibration"], program.EVALUATION_SEED: windows["held_out"][:16]}
    measured, plans = [], {}
    search, score = program.calibrate, program.evaluate

    def calibrate(model, ids, sparsity, name, *args, **how):
        plans[name] = search(model, ids, sparsity, name, *args, **how)
        return plans[name]

    def evaluate(*args, **how):
        measured.append(score(*args, **how))
        return measured[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "SETTINGS", SETTINGS)
        patch.setattr(program, "SHOWN", tuple(METHODS))
        patch.setattr(program, "sample_windows", lambda *_, seed: text[seed])
        patch.setattr(program, "calibrate", calibrate)
        patch.setattr(program, "evaluate", evaluate)
        folder = program.run_demo(tmp_path_factory.mktemp("demo") / "out")
    figures = json.loads((folder / "evaluation.json").read_text())
    (evaluation,) = measured
    assert all(figures[name]["kl"] == pytest.approx(evaluation.sparse[name].kl.mean) for name in METHODS)
    return plans, evaluation


# Planes of 3 bits beside half of the channels, which are 8 bits of bfloat16.
ORDER = (
    ("planes", "wisparse-plus"),
    ("wisparse-plus", "teal"),
    ("wisparse-plus", "wisparse"),
    ("wina", "uniform"),
    ("teal", "uniform"),
)


def test_the_order_of_the_methods(results):
    """Paired over windows, by more than two standard errors."""
    _, evaluation = results
    for better, worse in (*ORDER, ("wisparse", "uniform"), ("wisparse-paper", "uniform")):
        gap = evaluation.paired(better, worse)
        assert gap.mean < -2 * gap.error < 0, (better, worse, gap)


def test_the_papers_method_does_not_lose_to_teal(results):
    _, evaluation = results
    gap = evaluation.paired("wisparse", "teal")
    assert gap.mean < 2 * gap.error, gap


def test_the_new_method_is_far_below_teal(results):
    kl = {name: score.kl.mean for name, score in results[1].sparse.items()}
    assert kl["wisparse-plus"] < 0.6 * kl["teal"], kl


def test_sparse_models_predict_worse_than_the_dense_one_but_still_predict(results):
    _, evaluation = results
    dense = evaluation.dense.perplexity.mean
    for name, score in evaluation.sparse.items():
        assert dense < score.perplexity.mean < 2 * dense, name


def test_realised_sparsity_is_what_was_asked_for(results):
    plans, evaluation = results
    for name, score in evaluation.sparse.items():
        # Planes are read to 3 of 8.125 bits.
        asked = 1 - 3 / 8.125 if name == "planes" else 0.5
        assert plans[name].mean_sparsity == pytest.approx(asked, abs=1e-6 if name == "planes" else 1e-9)
        assert plans[name].mean_realised == pytest.approx(asked, abs=0.002)
        assert abs(score.sparsity.mean - asked) < 0.02, name


def test_settings_are_kept_in_the_plan(results):
    assert results[0]["wisparse-plus"].settings == dataclasses.asdict(SETTINGS)
