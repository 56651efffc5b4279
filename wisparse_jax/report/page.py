"""One self-contained HTML page of plans: figures for light and dark, and tables; and the figures as PNG files."""

from __future__ import annotations

import base64
import importlib.resources
from pathlib import Path
from typing import Any

from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import LAYERS
from wisparse_jax.report.figures import Plans, draw, drawable
from wisparse_jax.sparsity import SparsityPlan

PAGE = "index.html"


def write_report(plans: Plans, out: str | Path, title: str = "Sparsity plans") -> Path:
    """Write a report as a new folder: index.html, which needs nothing beside it, and the figures as PNG files.

    Args:
        plans: by the names that the page calls them.
        out: the folder; it must not exist.
        title: of the page.

    Returns:
        The page.

    Raises:
        WisparseError: no plans, or the folder exists or cannot be written.
    """
    from wisparse_jax.files import expanded, new_folder

    if not plans:
        raise WisparseError("report: expected at least one plan, found none")
    with new_folder(out, WisparseError) as folder:
        figures = []
        for name, (heading, figure) in drawable(plans).items():
            light, dark = draw(figure, plans), draw(figure, plans, dark=True)
            (folder / f"{name}.png").write_bytes(light)
            figures.append({"heading": heading, "light": _embedded(light), "dark": _embedded(dark)})
        (folder / PAGE).write_text(render(plans, figures, title), encoding="utf-8")
    return expanded(out) / PAGE


def render(plans: Plans, figures: list[dict[str, Any]], title: str) -> str:
    """The page; every text from a plan is escaped."""
    from jinja2 import Environment

    source = (importlib.resources.files("wisparse_jax") / "report" / "page.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    rows = [_row(name, plan) for name, plan in plans.items()]
    held_out = [
        (name, "the plan" if measured == "plan" else measured, kl, perplexity, sparsity)
        for name, plan in plans.items()
        for measured, perplexity, kl, sparsity in (*_dense(plan), *plan.held_out_rows())
    ]
    notes = [(name, note) for name, plan in plans.items() for note in plan.history.get("notes", [])]
    layers = [(name, [f"{value:.3f}" for value in plan.sparsities.mean(axis=0)]) for name, plan in plans.items()]
    tables = {"rows": rows, "held_out": held_out, "notes": notes, "layers": layers, "layer_names": LAYERS}
    return page.render(title=title, figures=figures, **tables)


def _row(name: str, plan: SparsityPlan) -> dict[str, str]:
    blocks = plan.block_sparsities
    return {
        "name": name,
        "method": plan.method,
        "model": str(plan.calibration.get("model") or plan.fingerprint[:12]),
        "target": f"{plan.target:.3f}",
        "realised": f"{plan.mean_realised:.3f}",
        "densest": f"{int(blocks.argmin())} ({blocks.min():.3f})",
        "sparsest": f"{int(blocks.argmax())} ({blocks.max():.3f})",
        "text": str(plan.calibration.get("text", "unknown")),
        "seconds": f"{sum(plan.timings.values()):.0f}",
    }


def _dense(plan: SparsityPlan) -> list[tuple[str, str, str, str]]:
    """The row of the dense model, where there are any."""
    perplexity = plan.held_out.get("dense_perplexity")
    return [] if perplexity is None else [("dense", f"{perplexity:.2f}", "0", "0")]


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
