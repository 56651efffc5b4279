"""Plans at the share that the plan skips which they are compared with."""

import dataclasses
import math
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pytest

from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation import SparseScore, evaluate, rivals_of
from wisparse_jax.evaluation.shares import CLOSE, MOST_RUNS, at_shares
from wisparse_jax.models.model import Model
from wisparse_jax.models.rules import thresholds_of
from wisparse_jax.search import SearchSettings, calibrate
from wisparse_jax.sparsity import apply


@pytest.fixture(scope="module")
def plans(tiny_model, tiny_tokens):
    """TEAL's, the same with thresholds that skip too much, and another method's at another sparsity."""
    settings = SearchSettings(compare_teal=False, layer_step=0.25)
    teal = calibrate(tiny_model, tiny_tokens, 0.5, "teal", settings=settings)
    off = dataclasses.replace(teal, method="off", thresholds=teal.thresholds * 1.3)
    few = calibrate(tiny_model, tiny_tokens, 0.3, "uniform", settings=settings)
    return {name: apply(tiny_model, plan) for name, plan in {"off": off, "teal": teal, "few": few}.items()}


def test_a_plan_is_scored_at_its_rivals_share(plans, tiny_model, tiny_tokens):
    """A factor leads back from thresholds of 1.3 times the rival's to the rival itself."""
    found = evaluate(tiny_model, tiny_tokens, plans, rivals=rivals_of(plans))
    assert found.rivals == {"off": "teal"} and set(found.matched) == {"off"}
    teal, off, at = found.sparse["teal"], found.sparse["off"], found.matched["off"]
    assert off.sparsity.mean > teal.sparsity.mean + 0.05 and off.kl.mean > 1.3 * teal.kl.mean
    assert abs(at.sparsity.mean - teal.sparsity.mean) < CLOSE
    assert (
        found.ratio("off") == pytest.approx(at.kl.mean / teal.kl.mean) == pytest.approx(1, abs=0.1)
    )  # a tiny model has few channels
    assert math.isnan(found.ratio("teal"))

    gap = found.paired("off", "teal")
    assert (
        gap.mean == pytest.approx((at.window_kl - teal.window_kl).mean())
        and abs(gap.mean) < 0.15 * (off.window_kl - teal.window_kl).mean()
    )
    assert found.paired("few", "teal").mean == pytest.approx((found.sparse["few"].window_kl - teal.window_kl).mean())
    out = found.as_json("off")
    assert (out["rival"], out["kl"], out["kl_at_rival"]) == ("teal", off.kl.mean, at.kl.mean)
    assert (out["sparsity_at_rival"], out["kl_of_rival"]) == (at.sparsity.mean, found.ratio("off"))
    assert not {"rival", "kl_at_rival"} & set(found.as_json("teal"))


def test_what_is_measured_without_rivals_stays_the_same(plans, tiny_model, tiny_tokens):
    alone, found = (evaluate(tiny_model, tiny_tokens, plans, rivals=rivals) for rivals in (None, rivals_of(plans)))
    for name in plans:
        np.testing.assert_array_equal(alone.sparse[name].window_kl, found.sparse[name].window_kl)
    assert alone.paired("off", "teal").mean == pytest.approx(
        (alone.sparse["off"].window_kl - alone.sparse["teal"].window_kl).mean()
    )


def test_teal_is_the_rival_of_its_target_and_otherwise_the_first_plan(plans, tiny_model):
    def model(method, target, planes=None):
        plan = SimpleNamespace(method=method, target=target, planes=planes)
        return tiny_model.with_rules(plans["teal"].rules, plan)

    named = {
        "a": model("wisparse-plus", 0.5),
        "b": model("teal", 0.5),
        "c": model("uniform", 0.65),
        "d": model("wisparse", 0.65),
        "e": model("planes", 0.5, planes="curves"),
        "dense int8": tiny_model,
    }
    assert rivals_of(named) == {"a": "b", "d": "c"}


@pytest.mark.parametrize(
    ("rivals", "hold"),
    [({"off": "nobody"}, False), ({"nobody": "teal"}, False), ({"off": "dense"}, False), ({"off": "teal"}, True)],
)
def test_what_is_no_rival_is_refused(plans, tiny_model, tiny_tokens, rivals, hold):
    with pytest.raises(WisparseError, match=r"rivals: \w+: \w+: expected"):
        evaluate(tiny_model, tiny_tokens, plans | {"dense": tiny_model}, rivals=rivals, hold=hold)
    with pytest.raises(WisparseError, match="rivals: off: teal: expected names of sparse plans, the second without"):
        evaluate(tiny_model, tiny_tokens, plans, rivals={"off": "teal", "teal": "few"})


def search(share_of, plan, wanted):
    """What `at_shares` finds of a plan whose share follows from the thresholds' factor, and the runs that it took."""
    runs, start = [], plan.rules[0]["q"].thresholds

    def score(share):
        return SparseScore(np.ones(2), np.ones(2), np.full((2, 3), share), np.full((1, 7), share))

    def run(models: Mapping[str, Model]) -> dict[str, SparseScore]:
        runs.append(set(models))
        found = {}
        for name, model in models.items():
            assert model.rules is not None
            found[name] = score(share_of(float((thresholds_of(model.rules)[0]["q"] / start)[0])))
        return found

    known = {"a": score(share_of(1.0)), "b": score(wanted)}
    found = at_shares(run, {name: plan for name in known}, known, {name: wanted for name in known})
    return found["a"].sparsity.mean, runs


def test_the_search_for_the_factor(plans):
    """A few runs for a share that rises with the factor, none for a plan that is there; the nearest for one that does
    not."""
    share, runs = search(lambda factor: 1 - math.exp(-0.7 * factor), plans["teal"], 0.44)
    assert share == pytest.approx(0.44, abs=CLOSE) and 1 <= len(runs) <= 4 and all(run == {"a"} for run in runs)
    share, runs = search(lambda factor: min(0.6, 0.4 + 0.1 * factor), plans["teal"], 0.9)
    assert share == pytest.approx(0.6) and len(runs) == MOST_RUNS
