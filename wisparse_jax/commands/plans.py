"""The plans that a command names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from wisparse_jax.errors import WisparseError
from wisparse_jax.files import expanded

if TYPE_CHECKING:
    from wisparse_jax.sparsity import SparsityPlan


def named_plans(places: Sequence[str]) -> dict[str, SparsityPlan]:
    """The plans by the names of their folders, or by what was given where two have the same.

    Raises:
        WisparseError: one is named twice, or cannot be read.
    """
    from wisparse_jax.sparsity import SparsityPlan

    plans: dict[str, SparsityPlan] = {}
    seen = set()
    for place in places:
        path = expanded(place).resolve()
        path = path.parent if path.name == "plan.json" else path
        if path in seen:
            raise WisparseError(f"{place}: named twice")
        seen.add(path)
        plans[place if path.name in plans or not path.exists() else path.name] = SparsityPlan.load(place)
    return plans


def at_bits(plan: SparsityPlan | None, bits: float | None) -> SparsityPlan | None:
    """The plan at the bits of a weight that `--bits` asks for; as it is if it asks for none.

    Raises:
        WisparseError: no plan, not one for planes, or bits that it does not reach.
    """
    if bits is None:
        return plan
    if plan is None:
        raise WisparseError(f"bits = {bits}: expected a plan for planes, found none")
    return plan.at_bits(bits)


def plan_of(model: str, place: str | None) -> SparsityPlan | None:
    """The plan that was named or, for a model that was converted together with one, its own, which is said.

    Raises:
        WisparseError: no such model, or a plan that cannot be read.
    """
    from wisparse_jax.sparsity import SparsityPlan, own_plan

    if place is not None:
        return SparsityPlan.load(place)
    if (plan := own_plan(model)) is not None:
        print(f"the plan that {model} was converted with", file=sys.stderr)
    return plan
