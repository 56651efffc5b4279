"""Plans at equal realised shares: what a plan skips depends on the text, and a plan that skips less loses less."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation.scores import SparseScore
from wisparse_jax.models.model import Model
from wisparse_jax.models.rules import multiplied_rules

RIVAL = "teal"  # the method that others are compared with
CLOSE = 0.0005  # of a share
MOST_RUNS = 8
SLOPE = 0.4  # of the share by the logarithm of the factor, around a half
LONGEST = 0.5  # step of that logarithm


def rivals_of(plans: Mapping[str, Model]) -> dict[str, str]:
    """Which plan each is compared with: TEAL's of the same target or, without it, the first one of that target.

    Shares of channels and shares of the bits of planes are not compared. Models without a plan have no rival.
    """
    groups: dict[tuple[float, bool], list[str]] = {}
    for name, model in plans.items():
        if model.plan is not None:
            groups.setdefault((round(model.plan.target, 6), model.plan.planes is not None), []).append(name)
    found = {}
    for names in groups.values():
        rival = next((name for name in names if plans[name].plan.method == RIVAL), names[0])
        found |= {name: rival for name in names if name != rival}
    return found


def check_rivals(plans: Mapping[str, Model], rivals: Mapping[str, str], hold: bool) -> None:
    """Refuse rivals that are none.

    Raises:
        WisparseError: names that are no sparse plans, a rival with a rival, or plans whose shares are held already.
    """
    for name, rival in rivals.items():
        if any(one not in plans or plans[one].rules is None for one in (name, rival)) or rival in rivals:
            raise WisparseError(f"rivals: {name}: {rival}: expected names of sparse plans, the second without a rival")
        if hold:
            raise WisparseError(f"rivals: {name}: {rival}: expected none with hold, which keeps every plan's own share")


def at_shares(
    run: Callable[[Mapping[str, Model]], Mapping[str, SparseScore]],
    plans: Mapping[str, Model],
    found: Mapping[str, SparseScore],
    wanted: Mapping[str, float],
) -> dict[str, SparseScore]:
    """The scores of plans with all thresholds times one factor each, at which they skip the shares that are wanted.

    By secants, all plans that are not there yet in one run; where thresholds cannot bring a share about, it is the
    nearest that was met.

    Args:
        run: scores models by name.
        plans: the models as they are.
        found: their scores.
        wanted: the share to skip, by the plan's name.
    """
    tried = {name: [(0.0, found[name].sparsity.mean)] for name in wanted}  # the factor's logarithm, and the share
    best = {name: found[name] for name in wanted}
    for _ in range(MOST_RUNS):
        far = [name for name, share in wanted.items() if abs(best[name].sparsity.mean - share) > CLOSE]
        if not far:
            break
        for name in far:
            tried[name].append((_next(tried[name], wanted[name]), math.nan))
        models = {name: multiplied(plans[name], math.exp(tried[name][-1][0])) for name in far}
        for name, score in run(models).items():
            tried[name][-1] = tried[name][-1][0], score.sparsity.mean
            if abs(score.sparsity.mean - wanted[name]) < abs(best[name].sparsity.mean - wanted[name]):
                best[name] = score
    return best


def multiplied(model: Model, factor: float) -> Model:
    """A sparse model with all thresholds times a factor."""
    assert model.rules is not None
    return model.with_rules(multiplied_rules(model.rules, factor), model.plan)


def _next(tried: list[tuple[float, float]], wanted: float) -> float:
    """Where the share is expected to be the one that is wanted."""
    at, share = tried[-1]
    slope = SLOPE
    if len(tried) > 1 and at != tried[-2][0]:
        slope = (share - tried[-2][1]) / (at - tried[-2][0])
    step = (wanted - share) / slope if slope > 0 else math.copysign(LONGEST, wanted - share)
    return at + max(-LONGEST, min(LONGEST, step))
