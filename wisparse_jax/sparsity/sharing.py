"""Plans on the hub: pulled by name like models, pushed with a card."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path
from typing import Any

from wisparse_jax.errors import PlanError
from wisparse_jax.files import expanded
from wisparse_jax.models.config import LAYERS
from wisparse_jax.sparsity.plan import HISTORY_FILE, PLAN_FILE, TENSORS_FILE, SparsityPlan
from wisparse_jax.sparsity.storage import plan_files

CARD_FILE = "README.md"
TAGS = ("activation-sparsity", "wisparse")


def plan_folder(name: str | Path) -> Path:
    """The local folder of a plan: what is there, or a hub id `org/name`, of which the plan's own files are fetched.

    Without the hub, what the cache has is used.

    Raises:
        PlanError: a hub id of no repository, or of one without a plan, or no network.
    """
    from wisparse_jax.models.hub import explained, is_hub_id, snapshot

    if not is_hub_id(name):
        return expanded(name)
    with explained(f"{name}: no such folder here, and as a hub id", PlanError):
        folder = snapshot(str(name), (PLAN_FILE, TENSORS_FILE, HISTORY_FILE))
    if not (folder / PLAN_FILE).exists():
        raise PlanError(f"{name}: no plan: there is no {PLAN_FILE} in this repository on the hub")
    return folder


def check_repository(name: str) -> None:
    """Refuse what cannot be the name of a repository to upload to.

    Raises:
        PlanError: not spelled as `org/name`.
    """
    from wisparse_jax.models.hub import spells_repository

    if not spells_repository(name):
        raise PlanError(f"{name!r}: cannot be a repository on the hub: expected org/name")


def push_plan(plan: SparsityPlan, repository: str, base_model: str | None, private: bool) -> str:
    """Upload a plan; see `SparsityPlan.push`."""
    from huggingface_hub import CommitOperationAdd, HfApi

    from wisparse_jax.models.hub import explained

    check_repository(repository)
    files = plan_files(plan) | {CARD_FILE: card(plan, repository, base_model).encode()}
    with explained(f"{repository}:", PlanError, "it was not uploaded:"):
        api = HfApi()
        place = api.create_repo(repository, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, data) for name, data in files.items()]
        message = f"{plan.method} plan, sparsity {plan.target:g}"
        return str(api.create_commit(place.repo_id, operations, commit_message=message).commit_url)


def card(plan: SparsityPlan, repository: str, base_model: str | None = None) -> str:
    """The README of a plan's repository: figures, how to use it, what it was calibrated on.

    Args:
        plan: the plan.
        repository: where it is to be.
        base_model: hub id of its model; None takes the name that the plan knows, if it is one.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment

    known = str(plan.calibration.get("model") or "")
    model = base_model or (known if "/" in known else None)
    head = ModelCardData(base_model=model, library_name="wisparse-jax", tags=list(TAGS)).to_yaml()
    source = (importlib.resources.files("wisparse_jax") / "sparsity" / "card.md.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    page.filters["cell"] = _cell
    compared = [
        (f"this plan ({plan.method})" if name == "plan" else name, *found) for name, *found in plan.held_out_rows()
    ]
    layers = list(zip(LAYERS, plan.sparsities.mean(axis=0), strict=True))
    names = {"repository": repository, "model": model or known or "MODEL"}
    body = page.from_string(source).render(plan=plan, compared=compared, layers=layers, **names)
    return f"---\n{head}\n---\n\n{body}"


def _cell(value: Any) -> str:
    """Text of a plan for a line of Markdown."""
    return re.sub(r"([|`*_\[\]\\])", r"\\\1", " ".join(str(value).split()))
