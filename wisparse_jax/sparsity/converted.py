"""Models converted together with a plan: folded into its basis, the plan inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wisparse_jax.sparsity.plan import PLAN_FILE, SparsityPlan
from wisparse_jax.sparsity.storage import plan_files

PLAN_FOLDER = "plan"


def convert_with_plan(
    name: str | Path,
    out: str | Path,
    plan: SparsityPlan,
    weights: str | None = None,
    head: str | None = None,
    dtype: str | None = None,
    tokens: Any = None,
) -> None:
    """Write a model as a checkpoint folder whose weights are folded into the plan's basis, the plan in it.

    Whatever loads the folder runs the plan unless another one is named. Arguments and errors as in
    `models.checkpoint.convert`; rounding comes after folding. Tied embeddings become two matrices where there is a
    basis.

    Raises:
        PlanError: the plan is for another model.
    """
    from wisparse_jax.models.checkpoint import convert

    beside = {f"{PLAN_FOLDER}/{file}": data for file, data in plan_files(plan).items()}
    convert(name, out, weights, head, dtype, plan.basis, beside, plan.check_model, tokens)


def own_plan(name: str | Path) -> SparsityPlan | None:
    """The plan that a model was converted together with; None for any other model.

    Raises:
        WisparseError: no such model.
        PlanError: the plan is damaged.
    """
    from wisparse_jax.models.checkpoint import is_checkpoint
    from wisparse_jax.models.hub import resolve

    folder = resolve(name, ("config",))
    inside = folder / PLAN_FOLDER / PLAN_FILE
    return SparsityPlan.load(inside) if is_checkpoint(folder) and inside.exists() else None
