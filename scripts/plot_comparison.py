"""Figures from the folders that compare_methods.py and predicted_against_measured.py write.

    python scripts/plot_comparison.py runs/comparison runs/predicted --out runs/figures

Draws what the folders of these and of `wisparse sweep` hold, for each model and pair of texts: KL and perplexity
against sparsity, the ablations, cost against quality, budgets and exponents by block, BLiMP, predicted against measured
KL; and the picture that the README begins with. Several folders are drawn together.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import tyro
from tyro.conf import Positional

from wisparse_jax.errors import WisparseError
from wisparse_jax.report.comparison import Row, grouped, mean, read_rows
from wisparse_jax.report.curves import COLOURS, KL, STYLE, colour, draw_against_sparsity, quality_picture

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Draw comparisons."""

    folders: Positional[tuple[Path, ...]]
    out: Path
    form: str = "png"  # or svg, pdf


def main() -> None:
    """Draw every figure that there are rows for."""
    args = tyro.cli(Arguments, description=__doc__)
    try:
        tables = {name: read_rows(args.folders, [f"{name}.csv"]) for name in ("layers", "predicted")}
        tables["comparison"] = read_rows(args.folders, ["comparison.csv", "sweep.csv"])
    except WisparseError as error:
        sys.exit(f"plot_comparison: {error}")
    if not any(tables.values()):
        sys.exit(f"plot_comparison: no tables in {', '.join(map(str, args.folders))}")
    args.out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, figure in figures(tables):
            file = args.out / f"{_file_name(name)}.{args.form}"
            figure.savefig(file)
            plt.close(figure)
            print(file)
    for name, picture in pictures(tables["comparison"]):
        (args.out / name).write_bytes(picture)
        print(args.out / name)


def pictures(rows: list[Row]) -> Iterator[tuple[str, bytes]]:
    """Names and PNGs of the methods beside each other, for light and for dark pages, as `wisparse sweep` draws them."""
    for (model, calibration, evaluation), own in grouped(rows, ("model", "calibration", "evaluation")):
        methods = [row for row in own if row["group"] == "method"]
        for dark in (False, True) if methods else ():
            name = f"{Path(str(model)).name} {calibration} {evaluation} picture{' dark' * dark}"
            yield f"{_file_name(name)}.png", quality_picture(methods, dark)


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def figures(tables: dict[str, list[Row]]) -> Iterator[tuple[str, Any]]:
    """Names and figures."""
    for (model, calibration, evaluation), rows in grouped(tables["comparison"], ("model", "calibration", "evaluation")):
        texts = f"{calibration} → {evaluation}"
        where = f"{Path(model).name} {calibration} {evaluation}"
        methods = [row for row in rows if row["group"] == "method"]
        if methods:
            for column, label in (("kl", KL), ("perplexity", "perplexity")):
                yield f"{where} {column}", against_sparsity(methods, column, label, f"{Path(model).name}, {texts}")
        if any(row["blimp"] is not None for row in methods):
            yield f"{where} blimp", against_sparsity(methods, "blimp", "BLiMP accuracy", Path(model).name)
        for (sparsity,), same in grouped(rows, ("sparsity",)):
            title = f"{Path(model).name} at {sparsity:.0%}, {texts}"
            ablated = [row for row in same if row["group"] in ("paper's order", "alone", "together", "left out")]
            if ablated:
                yield f"{where} {sparsity:g} ablations", bars(ablated, same, title)
            spent = [row for row in same if row["group"].startswith("allocator")]
            if spent:
                yield f"{where} {sparsity:g} cost", cost_against_quality(spent, title)
    for (model, calibration, sparsity), rows in grouped(tables["layers"], ("model", "calibration", "sparsity")):
        own = [row for row in rows if row["variant"] in COLOURS]
        if own:
            yield f"{Path(model).name} {calibration} {sparsity:g} budgets", budgets_by_block(own, f"{sparsity:.0%}")
    for (model, method, sparsity), rows in grouped(tables["predicted"], ("model", "method", "sparsity")):
        title = f"{Path(model).name} at {sparsity:.0%}, {method}, {rows[0]['calibration']} → {rows[0]['evaluation']}"
        yield f"{Path(model).name} {method} {sparsity:g} predicted", predicted_against_measured(rows, title)


def against_sparsity(rows: list[Row], column: str, label: str, title: str) -> Any:
    """A line for each method, means over seeds."""
    figure, axes = plt.subplots(figsize=(4.8, 3.6))
    draw_against_sparsity(axes, rows, column, label)
    axes.set_title(title, fontsize=8, wrap=True)
    return figure


def bars(rows: list[Row], all_rows: list[Row], title: str) -> Any:
    """KL of every variant, by group, beside TEAL's."""
    groups = grouped(rows, ("group",))
    count = len({row["variant"] for row in rows}) + len(groups)
    figure, axes = plt.subplots(figsize=(6.0, 0.8 + 0.24 * count))
    at, ticks = 0.0, []
    shades = ("#009E73", "#0072B2", "#D55E00", "#999999")
    for ((_,), own), shade in zip(groups, itertools.cycle(shades)):
        for (name,), same in grouped(own, ("variant",)):
            value, error = mean(same, "kl"), mean(same, "kl_error")
            axes.barh(at, value, xerr=error, color=shade, height=0.8)
            axes.text(value + error, at, f" {value:.3f}", va="center", fontsize=7)
            ticks.append((at, name))
            at += 1
        at += 0.7
    teal = [row for row in all_rows if row["variant"] == "teal"]
    if teal:
        axes.axvline(mean(teal, "kl"), color="black", lw=0.8, ls=":", label="teal")
        axes.legend(fontsize=8)
    axes.set_yticks([y for y, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="KL(dense ‖ sparse), nats per token")
    axes.grid(axis="y", visible=False)
    axes.set_title(title, fontsize=8, wrap=True)
    return figure


def cost_against_quality(rows: list[Row], title: str) -> Any:
    """Each allocator a point: forward tokens spent, KL reached."""
    figure, axes = plt.subplots(figsize=(4.8, 3.6))
    free = []
    for (name,), own in grouped(rows, ("variant",)):
        tokens, kl, label = mean(own, "forward_tokens"), mean(own, "kl"), name.rpartition(": ")[2]
        if tokens <= 0:
            free.append((label, kl))
            continue
        axes.errorbar(tokens, kl, mean(own, "kl_error"), marker="o", ms=5, color=colour(label))
        axes.annotate(f" {label}", (tokens, kl), fontsize=8, va="bottom")
    for label, kl in free:
        axes.axhline(kl, color="#999999", lw=0.8, ls=":")
        axes.annotate(f"{label} (free)", (0.02, kl), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    axes.set_xscale("log")
    axes.margins(x=0.3)
    axes.set(xlabel="tokens through the model, for budgets", ylabel="KL(dense ‖ sparse), nats per token")
    axes.set_title(title, fontsize=8, wrap=True)
    return figure


def budgets_by_block(rows: list[Row], title: str) -> Any:
    """For each method the layers' sparsities (lines) and their weighted mean by block (bars), and the exponents."""
    methods = grouped(rows, ("variant",))
    figure, axes = plt.subplots(2, len(methods), figsize=(2.6 * len(methods), 4.4), sharey="row", squeeze=False)
    for column, ((name,), own) in enumerate(methods):
        for row, (value, label) in enumerate((("layer_sparsity", "sparsity"), ("exponent", "exponent"))):
            ax: Axes = axes[row, column]
            for (layer,), of_kind in grouped(own, ("layer",)):
                by_block = grouped(of_kind, ("block",))
                ax.plot([b for (b,), _ in by_block], [mean(r, value) for _, r in by_block], lw=1, label=layer)
            if row == 0:
                by_block = grouped(own, ("block",))
                means = [_weighted(rs) for _, rs in by_block]
                ax.bar([b for (b,), _ in by_block], means, color="#dddddd", zorder=0)
                ax.set_title(f"{name}, {title}", fontsize=8)
            else:
                ax.set_xlabel("block")
                ax.set_ylim(-0.05, 1.05 * max(1.0, *(r["exponent"] for r in rows)))
            ax.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
            if column == 0:
                ax.set_ylabel(label)
    axes[0, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _weighted(rows: list[Row]) -> float:
    return float(np.average([r["layer_sparsity"] for r in rows], weights=[r["layer_weights"] for r in rows]))


def predicted_against_measured(rows: list[Row], title: str) -> Any:
    """Each plan a point, the line where both are equal, and the correlation."""
    figure, axes = plt.subplots(figsize=(4.2, 3.8))
    for (name,), own in grouped(rows, ("plan",)):
        known = name in ("uniform", "greedy", "second-order")
        x, y = ([row[column] for row in own] for column in ("predicted", "measured"))
        axes.scatter(x, y, s=40 if known else 12, marker="*" if known else "o", label=name, alpha=0.8, zorder=3)
    both = np.array([[row["predicted"], row["measured"]] for row in rows])
    ends = [both.min() * 0.95, both.max() * 1.05]
    axes.plot(ends, ends, color="black", lw=0.8, ls=":")
    found = f"r = {np.corrcoef(both.T)[0, 1]:.3f}, {len(both)} plans"
    axes.text(0.97, 0.03, found, transform=axes.transAxes, ha="right")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.set(xlabel="predicted KL, nats per token", ylabel="measured KL, nats per token")
    axes.set_title(title, fontsize=8, wrap=True)
    axes.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    main()
