"""Figures of plans, by matplotlib; each in colours for a light and for a dark page.

They are as wide as a phone's page at a size of text that can be read there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from wisparse_jax.models.config import LAYERS
from wisparse_jax.report.canvas import PALETTE, drawn, label, page_style
from wisparse_jax.sparsity import SparsityPlan

Plans = Mapping[str, SparsityPlan]
_WIDTH = 5.2  # inches
_COLUMNS = 3  # of a legend below a figure


def draw(figure: Callable[[Plans, Any], Any], plans: Plans, dark: bool = False) -> bytes:
    """A figure of plans as a PNG, at 150 dots an inch."""
    from cycler import cycler

    style: dict[str, Any] = {"axes.prop_cycle": cycler(color=PALETTE), "font.size": 11, "legend.frameon": False}
    style |= page_style(dark)
    return drawn(lambda canvas: figure(plans, canvas), style, layout="constrained")


def budgets(plans: Plans, canvas: Any) -> None:
    """The sparsity of every layer, a plan below the other."""
    _tables(canvas, {name: plan.sparsities for name, plan in plans.items()}, "sparsity", 0.0, 1.0)


def exponents(plans: Plans, canvas: Any) -> None:
    """The exponent of every layer, a plan below the other."""
    tables = {name: plan.exponents for name, plan in plans.items()}
    _tables(canvas, tables, "exponent", 0.0, max(float(table.max()) for table in tables.values()) or 1.0)


def held_out_kl(plans: Plans, canvas: Any) -> None:
    """Held-out KL against realised sparsity, of the plans and of what they were compared with."""
    canvas.set_size_inches(_WIDTH, 3.6)
    axes = canvas.subplots()
    marks: dict[str, list[tuple[float, float]]] = {}
    for name, plan in plans.items():
        for other, found in plan.held_out.items():
            if isinstance(found, dict):
                shown = name if other == "plan" else f"{other}, for comparison"
                marks.setdefault(shown, []).append((found["sparsity"], found["kl"]))
    for name, points in marks.items():
        beside = name.endswith(", for comparison")
        axes.plot(*zip(*sorted(points), strict=True), "x:" if beside else "o-", label=label(name), markersize=8)
    axes.set(xlabel="realised sparsity", ylabel="KL(dense || sparse), nats per token")
    axes.margins(x=0.2)
    axes.xaxis.get_major_locator().set_params(nbins=5)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=9)


def predictions(plans: Plans, canvas: Any) -> None:
    """The KL that the search of budgets predicted against that on held-out windows, and where both are equal."""
    canvas.set_size_inches(_WIDTH, 3.6)
    axes = canvas.subplots()
    points = {name: found for name, plan in plans.items() if (found := _predicted(plan)) is not None}
    for i, (name, point) in enumerate(points.items()):
        axes.plot(*point, "o", label=label(name), color=PALETTE[i % len(PALETTE)])
    most = 1.1 * max(value for point in points.values() for value in point)
    axes.plot([0, most], [0, most], ":", color="#888888")
    axes.set(xlabel="predicted KL, nats per token", ylabel="held-out KL, nats per token")
    axes.legend(fontsize=9)


def convergence(plans: Plans, canvas: Any) -> None:
    """How each search went on: every list of numbers of a plan's history, from its start to its end."""
    curves = {name: _curves(plan.history) for name, plan in plans.items()}
    titles = list(dict.fromkeys(title for found in curves.values() for title in found))
    canvas.set_size_inches(_WIDTH, max(2.2 * len(titles), 1))
    grid = canvas.subplots(len(titles), 1, squeeze=False)[:, 0]
    for axes, title in zip(grid, titles, strict=True):
        for i, (name, found) in enumerate(curves.items()):
            if title in found:
                axes.plot(found[title], "o-", markersize=3, label=label(name), color=PALETTE[i % len(PALETTE)])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(title, fontsize=11)
        axes.legend(fontsize=9)


def stages(plans: Plans, canvas: Any) -> None:
    """Seconds of each stage, a bar a plan."""
    names = list(dict.fromkeys(stage for plan in plans.values() for stage in plan.timings))
    canvas.set_size_inches(_WIDTH, 0.9 + 0.45 * len(plans) + 0.25 * -(-len(names) // _COLUMNS))
    axes = canvas.subplots()
    left = np.zeros(len(plans))
    for stage, shade in zip(names, np.linspace(0.15, 0.95, max(len(names), 1)), strict=False):
        seconds = np.array([plan.timings.get(stage, 0.0) for plan in plans.values()])
        axes.barh(list(plans), seconds, left=left, label=label(stage), color=_shades()(shade))
        left += seconds
    axes.invert_yaxis()
    axes.set(xlabel="seconds")
    canvas.legend(fontsize=9, ncols=_COLUMNS, loc="outside lower center")


def drawable(plans: Plans) -> dict[str, tuple[str, Callable[[Plans, Any], None]]]:
    """The figures that the plans have the numbers for, with a title each, by name."""
    figures = {"budgets": ("Sparsity by block and layer", budgets)}
    if any(np.ptp(plan.exponents) > 0 for plan in plans.values()):
        figures["exponents"] = ("Exponents by block and layer", exponents)
    if any("plan" in plan.held_out for plan in plans.values()):
        figures["held_out_kl"] = ("Held-out KL against sparsity", held_out_kl)
    if any(_predicted(plan) is not None for plan in plans.values()):
        figures["predicted"] = ("Predicted against held-out KL", predictions)
    if any(_curves(plan.history) for plan in plans.values()):
        figures["convergence"] = ("Search convergence", convergence)
    if any(plan.timings for plan in plans.values()):
        figures["stages"] = ("Time per stage", stages)
    return figures


def _shades() -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"]


def _tables(canvas: Any, tables: Mapping[str, Any], label: str, low: float, high: float) -> None:
    canvas.set_size_inches(_WIDTH, 0.6 + 1.75 * len(tables))
    grid = canvas.subplots(len(tables), 1, squeeze=False)[:, 0]
    image = None
    for axes, (name, table) in zip(grid, tables.items(), strict=True):
        image = axes.imshow(table.T, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axes.set_yticks(range(len(LAYERS)), LAYERS, fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(name, fontsize=11)
    grid[-1].set_xlabel("block")
    canvas.colorbar(image, ax=list(grid), label=label, shrink=0.8)


def _predicted(plan: SparsityPlan) -> tuple[float, float] | None:
    """The KL that was predicted for the plan's budgets and the one that was measured, where both are known."""
    budgets = plan.history.get(f"budgets {plan.target:g}")
    predicted = budgets.get("predicted") if isinstance(budgets, Mapping) else None
    measured = plan.held_out.get("plan", {}).get("kl")
    return None if predicted is None or measured is None else (float(predicted), float(measured))


def _curves(history: Mapping[str, Any], prefix: str = "") -> dict[str, list[float]]:
    """Every list of at least three numbers in a history, by where it stands."""
    curves = {}
    for key, value in history.items():
        title = f"{prefix}{key}"
        if isinstance(value, Mapping):
            curves |= _curves(value, f"{title}: ")
        elif isinstance(value, list) and len(value) > 2 and all(type(x) in (int, float) for x in value):
            curves[title] = [float(x) for x in value]
    return curves
