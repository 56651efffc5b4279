"""By which margin a part is kept."""

import numpy as np
import pytest

import wisparse_jax as ws
from wisparse_jax.calibration import run_dense
from wisparse_jax.calibration.planes import uniform_planes
from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation import evaluate
from wisparse_jax.search.verdict import Verdict, verdict

BEFORE = np.array([0.5, 0.3, 0.9, 0.4, 0.6, 0.7, 0.2, 0.8])
NOISE = np.array([1, -1, 1, -1, 1, -1, 1, -1])  # standard error of 8: 1 / sqrt(7)


@pytest.mark.parametrize(("mean", "kept"), [(-0.8, True), (-0.7, False), (0.0, False), (0.8, False)])
def test_a_part_stays_if_it_wins_by_two_standard_errors(mean, kept):
    found = verdict(BEFORE, BEFORE + 0.01 * (mean + NOISE))
    assert found.kept == kept and bool(found.why) != kept
    if mean == -0.7:
        assert found.why == "dropped, held-out KL 0.5430 instead of 0.5500 (-0.0070 ± 0.0038 over 8 windows)"


def test_windows_differ_more_than_what_a_part_does_to_each():
    """The differences are paired: windows' own KL, .2 to .9, does not hide a hundredth on all of them."""
    assert verdict(BEFORE, BEFORE - 0.01 + 0.001 * NOISE).kept
    assert not verdict(BEFORE, BEFORE[::-1] - 0.01).kept


@pytest.mark.parametrize("windows", [1, 3, 4])
def test_few_windows_judge_nothing(windows):
    kept, why = verdict(BEFORE[:windows], BEFORE[:windows] + 1)
    assert kept == (windows < 4)
    assert why.startswith("dropped" if windows == 4 else f"kept unjudged: {windows} held-out windows, expected 4")


def kinds_of(*sizes):
    return [f"kind {k}" for k, size in enumerate(sizes) for _ in range(size)]


def changed(kinds, harmed):
    """Windows of which those of one kind lose by a part and all others gain much more."""
    kinds = np.asarray(kinds)
    before = np.linspace(0.3, 0.6, len(kinds))
    return before, before + np.where(kinds == harmed, 0.001, -0.1) + 1e-4 * (-1) ** np.arange(len(kinds))


@pytest.mark.parametrize(
    ("sizes", "harmed", "kept"),
    [
        ((8, 8, 4), "kind 2", False),  # a fifth of the windows
        ((8, 8, 3), "kind 2", True),  # too few for an error of its own
        ((30, 30, 4), "kind 2", True),  # less than a tenth
        ((12, 4), "", True),
    ],
)
def test_every_kind_that_weighs_a_tenth_has_to_gain(sizes, harmed, kept):
    kinds = kinds_of(*sizes)
    before, after = changed(kinds, harmed)
    found = verdict(before, after, kinds)
    assert found.kept == kept and verdict(before, after).kept
    assert kept or f"windows of {harmed})" in found.why


def test_small_kinds_are_asked_together():
    kinds = kinds_of(12, 1, 1, 1, 1)
    before = np.full(16, 0.5)
    after = np.where(np.asarray(kinds) == "kind 0", 0.4, 0.52) + 1e-4 * (-1) ** np.arange(16)
    found = verdict(before, after, kinds)
    assert not found.kept and "4 windows of the other kinds)" in found.why
    assert verdict(before[:15], after[:15], kinds[:15]).kept  # three are too few


def test_one_kind_for_every_window(tiny_model, tiny_tokens):
    with pytest.raises(WisparseError, match="kinds: expected one for each of 4 windows, found 3"):
        ws.calibrate(tiny_model, tiny_tokens, method="uniform", kinds=["prose"] * 3)


def test_the_kinds_of_the_held_out_windows_decide(tiny_model, tiny_tokens, monkeypatch):
    """The last ones, of which the judge hears in their order."""
    heard = []

    def told(before, after, kinds):
        heard.append(kinds)
        return Verdict(True, "as told")

    monkeypatch.setattr("wisparse_jax.search.judge.verdict", told)
    settings = ws.SearchSettings(
        held_out_share=0.5, exponent_step=0.75, exponent_tokens=64, compare_teal=False, allocator="uniform"
    )
    plan = ws.calibrate(tiny_model, tiny_tokens, 0.5, "wisparse", settings=settings, kinds=["a", "b", "c", "d"])
    assert heard and set(heard) == {("c", "d")}
    assert "exponents at 0.5: as told" in plan.history["notes"]


def test_uniform_planes_read_the_same_share_of_every_layer(demo, demo_text):
    """And lose less than skipping does at half the bytes of int8."""
    windows = demo_text["calibration"][:4]
    run = run_dense(demo, windows)
    models = {f"{share:g}": uniform_planes(run, "int2+2+2+2", share) for share in (0.5, 0.63)}
    found = evaluate(demo, windows, models).sparse
    for name, score in found.items():
        assert score.sparsity.mean == pytest.approx(float(name), abs=0.03)
        assert np.ptp(score.layer_sparsity) < 0.15
    assert 0 < found["0.5"].kl.mean < 0.7 * found["0.63"].kl.mean < 0.3
