"""Models on disk and the plans that they run: loaded together, or converted together with the plan inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from wisparse_jax.models.model import Model
from wisparse_jax.sparsity.apply import apply
from wisparse_jax.sparsity.plan import PLAN_FILE, SparsityPlan
from wisparse_jax.sparsity.storage import plan_files

PLAN_FOLDER = "plan"


def convert(
    name: str | Path,
    out: str | Path,
    weights: str | None = None,
    head: str | None = None,
    dtype: str | None = None,
    tokens: Any = None,
    *,
    plan: SparsityPlan | str | Path | None = None,
) -> None:
    """Write a model as a checkpoint folder, with a plan inside and the weights folded into its basis, if it is given.

    Whatever loads the folder runs the plan unless another one is named. Arguments and errors as in
    `models.checkpoint.convert`; rounding comes after folding. Tied embeddings become two matrices where there is a
    basis.

    Args:
        name: a folder, a hub id, `demo`, or a GGUF file.
        out: the new folder.
        weights: "int8" or "int4" rounds the block linears.
        head: "int8" rounds the head.
        dtype: of weights that are not rounded to integers; None keeps each tensor's own.
        tokens: windows of text by which int4 weights make up for their rounding errors.
        plan: a plan, or what `SparsityPlan.load` takes.

    Raises:
        PlanError: the plan is for another model, or cannot be read.
    """
    from wisparse_jax.models import checkpoint

    if plan is None:
        checkpoint.convert(name, out, weights, head, dtype, tokens=tokens)
        return
    plan = as_plan(plan)
    weights = plan.weights(weights)
    beside = {f"{PLAN_FOLDER}/{file}": data for file, data in plan_files(plan).items()}
    checkpoint.convert(name, out, weights, head, dtype, plan.basis, beside, plan.check_model, tokens)


def load(
    name: str | Path,
    dtype: str | None = None,
    weights: str | None = None,
    head: str | None = None,
    *,
    plan: SparsityPlan | str | Path | None = None,
    mesh: str | Mapping[str, int] | Mesh | None = None,
    verify: bool = True,
) -> Model:
    """Load a model onto the default device, or spread over several; with a plan it is sparse.

    A plan's basis is folded in tensor by tensor, before any rounding to integers: memory holds the model and what is on
    its way, see `models.weights.read_weights`.

    Args:
        name: a folder (in Hugging Face format, or written by `convert`), a hub id `org/name`, or `demo`.
        dtype: "float32", "bfloat16" or "float16", of activations and of weights that are not rounded; None is bfloat16
            on GPU and TPU, float32 on CPU.
        weights: "int8" or "int4" rounds the block linears; None keeps them as they are.
        head: "int8" rounds the head; None keeps it as it is.
        plan: a plan, or what `SparsityPlan.load` takes; None is the one that the model was converted together with, if
            it was: `load(name).dense` is without.
        mesh: the devices to spread it over, such as "data=2,model=4" or `jax.sharding.Mesh`, see `models.mesh`.
        verify: compare all that a converted checkpoint holds with its digests.

    Raises:
        PlanError: the plan was made for another model, or cannot be read.
        WisparseError: as `models.loading.load`.
    """
    from wisparse_jax.models import loading

    chosen = own_plan(name) if plan is None else as_plan(plan)
    if chosen is None:
        return loading.load(name, dtype, weights, head=head, mesh=mesh, verify=verify)
    # For a plan for planes `apply` rounds the weights, unless they are stored so.
    kind = chosen.weights(weights)
    kind = kind if chosen.planes is None else None
    return apply(loading.load(name, dtype, kind, chosen.basis, verify, head, chosen.check_model, mesh), chosen)


def as_plan(plan: SparsityPlan | str | Path) -> SparsityPlan:
    """A plan, or the one at a place, see `SparsityPlan.load`."""
    return plan if isinstance(plan, SparsityPlan) else SparsityPlan.load(plan)


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
