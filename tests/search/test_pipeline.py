import dataclasses
import gc
import weakref
from collections import Counter
from unittest.mock import Mock

import numpy as np
import pytest

import wisparse_jax as ws
from wisparse_jax.calibration import Calibration, run_dense
from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation import quality
from wisparse_jax.search import (
    METHODS,
    SearchSettings,
    calibrate,
    calibrate_targets,
    calibrate_to_kl,
    pipeline,
    with_budgets,
)
from wisparse_jax.search.context import Context
from wisparse_jax.search.cost import expected
from wisparse_jax.search.progress import Progress
from wisparse_jax.search.search import Search
from wisparse_jax.search.stages import Size, basis, dense, exponents, score, training

QUICK = SearchSettings(
    held_out_share=0.25,
    statistics_tokens=64,
    absolute_steps=3,
    skipped_steps=3,
    heads_steps=3,
    gradient_tokens=64,
    training_steps=4,
    training_every=2,
    exponent_step=0.75,
    exponent_passes=1,
    population=4,
    generations=2,
    paper_generations=2,
    paper_offspring=3,
    layer_step=0.2,
    compare_teal=False,
)


@pytest.fixture(scope="module")
def runs(tiny_model, tiny_tokens):
    """For every method its plan, and the stages that its search went through."""
    with pytest.MonkeyPatch.context() as patch:
        met, stage = [], Progress.stage
        patch.setattr(Progress, "stage", lambda self, name: [met.append(name), stage(self, name)][1])
        found = {}
        for name in METHODS:
            met.clear()
            found[name] = calibrate(tiny_model, tiny_tokens, 0.5, name, settings=QUICK), list(met)
    return found


@pytest.fixture(scope="module")
def plans(runs):
    return {name: plan for name, (plan, _) in runs.items()}


def test_the_stages_of_a_search_are_foreseen(runs, tiny_config):
    for name, (_, met) in runs.items():
        stages = tuple(stage.configured(QUICK) for stage in METHODS[name].all_stages)
        foreseen = Counter(part.name for part in expected(Size(tiny_config, 192, 48, stages), targets=1))
        assert Counter(met) == foreseen, name
        assert set(met) <= {row for stage in stages for row in stage.rows}


def test_every_method_meets_the_target_exactly(plans):
    for plan in plans.values():
        assert plan.mean_sparsity == pytest.approx(0.5, abs=1e-12)
        assert plan.sparsities.min() >= 0 and plan.sparsities.max() <= 0.95
        assert plan.mean_realised == pytest.approx(0.5, abs=0.002)


def test_methods_differ_as_defined(plans):
    assert (plans["uniform"].exponents == 0).all() and (plans["uniform"].sparsities == 0.5).all()
    weights = np.asarray(plans["teal"].layer_weights) / sum(plans["teal"].layer_weights)
    for name, exponent in (("teal", 0), ("wina", 1)):  # each with the budgets of its own scores
        plan = plans[name]
        assert (plan.exponents == exponent).all() and np.ptp(plan.sparsities, axis=1).max() > 0
        np.testing.assert_allclose(plan.sparsities @ weights, 0.5)  # spread inside blocks alone
    assert (plans["wina"].sparsities != plans["teal"].sparsities).any()
    assert {"statistics", "exponents", "budgets", "thresholds", "held out"} <= set(plans["wisparse"].timings)
    for name in ("uniform", "teal", "wina", "wisparse", "wisparse-paper"):
        assert plans[name].basis is None and plans[name].gains is None and plans[name].biases is None


def test_the_new_method_has_all_its_parts(tiny_model, tiny_tokens):
    """Without held-out windows, which would drop what so few tokens do not improve."""
    settings = dataclasses.replace(QUICK, held_out_share=0.0)
    plus = calibrate(tiny_model, tiny_tokens, 0.5, "wisparse-plus", settings=settings)
    weights = np.asarray(plus.layer_weights) / sum(plus.layer_weights)
    assert (plus.exponents == 1).all() and plus.basis is not None and plus.gains is not None
    assert np.ptp(plus.sparsities @ weights) > 1e-3  # budgets over the whole model
    assert {"moments", "basis", "gains"} <= set(plus.timings)
    assert plus.biases is None and plus.held_out.keys() <= {
        "forward_tokens"
    }  # nothing would say when to stop training them


def test_same_seed_same_plan(plans, tiny_model, tiny_tokens):
    for method in ("wisparse", "wisparse-plus"):
        again = calibrate(tiny_model, tiny_tokens, 0.5, method, settings=QUICK)
        for name in ("exponents", "sparsities", "thresholds"):
            np.testing.assert_array_equal(getattr(again, name), getattr(plans[method], name))


@pytest.mark.parametrize("method", ["teal", "wisparse", "wisparse-plus"])
def test_nothing_of_a_search_stays_in_memory(tiny_model, tiny_tokens, monkeypatch, method):
    """Its dense runs, gigabytes on a device, go with it, and do not wait for garbage to be collected."""
    made, begin = [], Calibration.__init__

    def listen(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Calibration, "__init__", listen)
    gc.collect()
    gc.disable()
    try:
        plan = ws.calibrate(tiny_model, tiny_tokens, 0.5, method, settings=QUICK)
        assert made and plan.target == 0.5 and [one for one in made if one() is not None] == []
    finally:
        gc.enable()


def test_parts_can_be_switched_one_by_one(tiny_model, tiny_tokens):
    off = dataclasses.replace(QUICK, basis="none", gains="norms", biases="off", allocator="uniform")
    plan = calibrate(tiny_model, tiny_tokens, 0.5, settings=off)
    assert plan.basis is None and plan.gains is None and plan.biases is None and (plan.sparsities == 0.5).all()
    assert not {"moments", "basis", "gains", "biases"} & set(plan.timings)
    # Without held-out windows, which would drop what so few tokens do not improve.
    on = dataclasses.replace(QUICK, basis="eigen", gains="gradients", allocator="second-order", held_out_share=0.0)
    plan = calibrate(tiny_model, tiny_tokens, 0.5, "uniform", settings=on)
    assert plan.basis is not None and plan.gains is not None and np.ptp(plan.sparsities) > 0
    off = dataclasses.replace(QUICK, search_exponents=False)
    assert "exponents" not in calibrate(tiny_model, tiny_tokens, 0.5, "wisparse", settings=off).timings


def test_zero_sparsity_is_the_dense_model(tiny_model, tiny_tokens):
    plan = ws.calibrate(tiny_model, tiny_tokens, sparsity=0.0, settings=QUICK)
    expected = tiny_model(tiny_tokens)
    np.testing.assert_allclose(ws.apply(tiny_model, plan)(tiny_tokens), expected, atol=1e-5 * abs(expected).max())


def test_held_out_windows_are_the_last_and_stand_beside_the_baselines(tiny_model, tiny_tokens):
    """The plan's figures are those of an evaluation on the windows that no search saw."""
    plan = calibrate(tiny_model, tiny_tokens, 0.5, "wina", settings=dataclasses.replace(QUICK, compare_teal=True))
    held = plan.held_out
    assert held["windows"] == 1 and plan.calibration["held_out_windows"] == 1 and plan.calibration["tokens"] == 3 * 48
    score = ws.evaluate(ws.apply(tiny_model, plan), tiny_tokens[3:])
    assert held["plan"]["kl"] == pytest.approx(score.sparse["plan"].kl.mean, rel=1e-4)
    assert held["plan"]["perplexity"] == pytest.approx(score.sparse["plan"].perplexity.mean, rel=1e-4)
    assert held["dense_perplexity"] == pytest.approx(score.dense.perplexity.mean, rel=1e-4)
    for name in ("uniform", "teal"):
        other = calibrate(tiny_model, tiny_tokens, 0.5, name, settings=QUICK)
        assert held[name]["kl"] == pytest.approx(other.held_out["plan"]["kl"], rel=1e-4)


def test_held_out_windows_run_dense_once_a_model(tiny_model, tiny_tokens, monkeypatch):
    """Judgements go on from the runs that thresholds and training have: none runs the model itself again."""
    monkeypatch.setattr(quality, "_dense_block", Mock(side_effect=AssertionError))
    plan = calibrate(tiny_model, tiny_tokens, 0.5, settings=dataclasses.replace(QUICK, compare_teal=True))
    assert plan.held_out.keys() >= {"plan", "uniform", "teal"} and "basis, held-out KL" in plan.history


def test_too_few_windows_are_all_searched_on(tiny_model, tiny_tokens):
    plan = calibrate(tiny_model, tiny_tokens[:3], 0.5, settings=QUICK)
    assert plan.held_out.keys() <= {"forward_tokens"} and plan.biases is None
    assert plan.calibration["tokens"] == 3 * 48


def test_few_tokens_are_warned_about(plans, tiny_model, tiny_tokens, monkeypatch):
    assert any("72 sparse positions may over-fit" in note for note in plans["wina"].history["notes"])
    monkeypatch.setattr(dense, "FEW_TOKENS", 72)
    assert "notes" not in calibrate(tiny_model, tiny_tokens, 0.5, "wina", settings=QUICK).history


def test_targets_share_their_stages(tiny_model, tiny_tokens, monkeypatch):
    ran = []

    def counted(home, name):
        function = getattr(home, name)
        monkeypatch.setattr(home, name, lambda *a, **k: (ran.append(name), function(*a, **k))[1])

    for home, name in (
        (dense, "run_dense"), (basis, "run_dense"), (basis, "measure_moments"), (basis, "refine_basis"),
        (score, "gradient_gains"), (training, "train"),
    ):  # fmt: skip
        counted(home, name)
    plans = calibrate_targets(tiny_model, tiny_tokens, [0.3, 0.5], settings=QUICK)
    counts = {name: ran.count(name) for name in ran}
    # The dense run, of the model, and of the model in its basis.
    assert counts == {"run_dense": 2, "measure_moments": 1, "refine_basis": 1, "gradient_gains": 1, "train": 2}
    alone = calibrate(tiny_model, tiny_tokens, 0.5, settings=QUICK)
    for name in ("exponents", "sparsities", "thresholds"):
        np.testing.assert_array_equal(getattr(plans[1], name), getattr(alone, name))
    assert [plan.target for plan in plans] == [0.3, 0.5]


@pytest.mark.parametrize(("method", "off"), [("teal", 1.0), ("uniform", 1.6), ("uniform", 0.6)])
def test_the_largest_sparsity_that_keeps_a_kl(tiny_model, tiny_tokens, monkeypatch, method, off):
    """Of plans as they are in the end: what is trained, or searched, for a target may halve its KL, or add to it."""
    rough = Search.held_out_kl
    monkeypatch.setattr(Search, "held_out_kl", lambda *args: off * rough(*args))
    whole = calibrate(tiny_model, tiny_tokens, 0.5, method, settings=QUICK).held_out["plan"]["kl"]
    bound = 0.8 * whole
    plan = calibrate_to_kl(tiny_model, tiny_tokens, bound, method, settings=QUICK)
    assert 0 < plan.target < 0.5 and plan.held_out["plan"]["kl"] <= bound
    further = calibrate(tiny_model, tiny_tokens, plan.target + pipeline.STEP, method, settings=QUICK)
    assert further.held_out["plan"]["kl"] > bound


@pytest.mark.parametrize(("bound", "target"), [(5e-324, 0.0), (1.7e308, 0.3)])
def test_a_bound_that_every_plan_keeps_or_none(tiny_model, tiny_tokens, bound, target):
    settings = dataclasses.replace(QUICK, max_sparsity=0.302)
    assert calibrate_to_kl(tiny_model, tiny_tokens, bound, "uniform", settings=settings).target == target


def test_the_tries_for_a_bound_are_few_whatever_the_curve(tiny_model, tiny_tokens, monkeypatch):
    """KL that jumps where rough KL promises a gentle rise: guesses give way to halves."""
    tried = []

    def plan(_, target: float) -> Mock:
        tried.append(target)
        return Mock(ws.SparsityPlan, target=target, held_out={"plan": {"kl": -1e-9 if target < 0.9 else 1.0}})

    monkeypatch.setattr(Search, "plan", plan)
    monkeypatch.setattr(Search, "held_out_kl", lambda _, target: target)
    assert calibrate_to_kl(tiny_model, tiny_tokens, 0.1, "uniform", settings=QUICK).target == 0.895
    assert len(tried) < 14


def test_a_bound_on_kl_needs_held_out_windows(tiny_model, tiny_tokens):
    with pytest.raises(WisparseError, match="max-kl needs held-out windows"):
        calibrate_to_kl(tiny_model, tiny_tokens[:3], 0.1, "uniform", settings=QUICK)


def test_other_budgets_get_their_own_thresholds(tiny_model, tiny_tokens):
    """With the same budgets nothing changes; with others each layer skips what they say."""
    settings = dataclasses.replace(QUICK, held_out_share=0.0)
    plan = calibrate(tiny_model, tiny_tokens, 0.5, settings=dataclasses.replace(settings, basis="eigen"))
    calibration = run_dense(tiny_model, tiny_tokens, settings, basis=plan.basis)
    same = with_budgets(calibration, plan, plan.sparsities)
    np.testing.assert_allclose(same.thresholds, plan.thresholds, rtol=1e-5)
    other = np.random.default_rng(0).uniform(0.1, 0.9, plan.sparsities.shape)
    changed = with_budgets(calibration, plan, other)
    assert changed.target == pytest.approx(changed.mean_sparsity) and changed.held_out == {}
    found = ws.evaluate(tiny_model, tiny_tokens, {"plan": ws.apply(tiny_model, changed)}).sparse["plan"]
    assert found.layer_sparsity == pytest.approx(other, abs=0.03)  # the last position of a window is not scored
    assert changed.realised == pytest.approx(other, abs=0.002)


def worse(problem):
    """A budget with one block all but dense and the rest as sparse as it must be."""
    from wisparse_jax.search.problem import Allocation

    row = problem.within_budget(np.array([[0.1, 0.8, 0.6]]))
    return Allocation(np.repeat(row[0][:, None], 7, axis=1), {})


def test_a_stage_that_does_not_improve_is_dropped(tiny_model, tiny_tokens, monkeypatch):
    import jax

    from wisparse_jax.search.allocators import ALLOCATORS

    tiny_tokens = np.concatenate([np.roll(tiny_tokens, k, axis=1) for k in range(4)])  # four are held out
    teal = calibrate(tiny_model, tiny_tokens, 0.5, "teal", settings=QUICK)
    monkeypatch.setitem(ALLOCATORS, "evolution", dataclasses.replace(ALLOCATORS["evolution"], function=worse))
    settings = dataclasses.replace(QUICK, search_exponents=False, allocator="evolution")
    plan = calibrate(tiny_model, tiny_tokens, 0.5, "wisparse", settings=settings)
    np.testing.assert_allclose(plan.sparsities, teal.sparsities)
    assert any(note.startswith("budgets at 0.5: dropped, held-out KL") for note in plan.history["notes"])

    def harmful(_, held_out, start, *__, **___):
        key = jax.random.key(0)
        shapes = held_out.config.layer_shapes
        biases = [{n: jax.random.normal(key, s[1:]) for n, s in shapes.items()} for _ in start.biases]
        return start._replace(biases=biases), np.array([[1.0] * 4, curve, [2.0] * 4])

    monkeypatch.setattr(training, "train", harmful)
    settings = dataclasses.replace(QUICK, biases="on")
    for curve, kept in (([1.0] * 4, False), ([0.9, 1.0, 0.8, 1.05], False), ([0.9, 0.85, 0.8, 0.9], True)):
        plan = calibrate(tiny_model, tiny_tokens, 0.5, "uniform", settings=settings)
        notes = [note for note in plan.history.get("notes", []) if note.startswith("training at 0.5: dropped")]
        assert (plan.biases is not None, len(notes)) == (kept, not kept), curve


def test_the_second_search_of_exponents_goes_on_from_the_first(tiny_model, tiny_tokens, monkeypatch):
    """The first at uniform sparsity, the second at every layer's own, from what the first has found."""
    calls = []

    def found(loss, statistics, start, sparsities, *_):
        calls.append((start, sparsities))
        return start + 0.5, [2.0, 1.0]

    monkeypatch.setattr(exponents, "search_exponents", found)
    settings = dataclasses.replace(QUICK, allocator="greedy", held_out_share=0.0)
    plan = calibrate(tiny_model, tiny_tokens, 0.5, "wisparse", settings=settings)
    blocks = tiny_model.config.num_blocks
    np.testing.assert_array_equal([start for start, _ in calls], np.repeat([0.0, 0.5], blocks)[:, None] * np.ones(7))
    np.testing.assert_array_equal([own for _, own in calls[:blocks]], np.full((blocks, 7), 0.5))
    np.testing.assert_array_equal([own for _, own in calls[blocks:]], plan.sparsities)
    assert np.ptp(plan.sparsities) > 0.1 and (plan.exponents == 1.0).all()


def test_exponents_that_do_not_improve_are_dropped(tiny_model, tiny_tokens, monkeypatch):
    monkeypatch.setattr(
        exponents, "search_exponents", lambda *a, **k: (np.array([1.5, 0, 1.5, 0, 1.5, 0, 1.5]), [1.0, 0.5])
    )
    monkeypatch.setattr(Context, "held_out_kl", lambda self, draft: np.full(4, draft.exponents.sum()))
    settings = dataclasses.replace(QUICK, allocator="uniform")
    plan = calibrate(tiny_model, tiny_tokens, 0.5, "wisparse", settings=settings)
    assert (plan.exponents == 0).all()
    assert any(note.startswith("exponents at 0.5: dropped") for note in plan.history["notes"])


BAD = {
    "method": (
        dict(method="magic"),
        "method = 'magic': expected one of wisparse-plus, planes, grinqh, wisparse, wisparse-paper, teal, wina",
    ),
    "sparsity": (dict(sparsity=1.2), "sparsity = 1.2: expected a number from 0 to 0.95"),
    "nan": (dict(sparsity=float("nan")), "sparsity = nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(tiny_model, tiny_tokens, name):
    arguments, message = BAD[name]
    with pytest.raises(WisparseError, match=message):
        calibrate(tiny_model, tiny_tokens, **arguments)


def test_degenerate_text_is_warned_about(tiny_model):
    """The command refuses it; in Python who calls may know better."""
    dull = np.tile(np.asarray([5, 5, 5, 5, 7, 9], np.int32), (4, 8))
    with pytest.warns(UserWarning, match="calibration: the text is degenerate: in 4 of 4 windows"):
        plan = calibrate(tiny_model, dull, 0.5, "uniform", settings=QUICK)
    assert plan.mean_sparsity == 0.5


def test_tokens_that_the_model_cannot_read_are_refused(tiny_model, tiny_tokens, tiny_config):
    with pytest.raises(WisparseError, match=f"outside the vocabulary of {tiny_config.vocab_size}"):
        calibrate(tiny_model, np.asarray(tiny_tokens) + tiny_config.vocab_size)
    with pytest.raises(WisparseError, match="longer than the model's context"):
        calibrate(tiny_model, np.zeros((1, tiny_config.context + 1), np.int32))
    with pytest.raises(WisparseError, match="at least one window"):
        calibrate(tiny_model, np.zeros((0, 8), np.int32))
