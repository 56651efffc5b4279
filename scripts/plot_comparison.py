"""Figures and tables from the folders that compare_methods.py and `wisparse sweep` write.

    python scripts/plot_comparison.py runs/comparison runs/more --out runs/figures

For each model and pair of texts: KL and perplexity against sparsity, the ablations, cost against quality, quality of
each kind of weights against the bytes that a token reads and the speed measured with them; and the picture that the
README begins with. summary.md holds the same rows as tables. Several folders are drawn together.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import tyro
from tyro.conf import Positional

from wisparse_jax.benchmark.cost import token_bytes
from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import read_config
from wisparse_jax.presets import shapes
from wisparse_jax.report.canvas import GREY, PALETTE
from wisparse_jax.report.comparison import Row, error, formats_of, grouped, mean, read_rows, table
from wisparse_jax.report.curves import KL, STYLE, colour, draw_against_sparsity, quality_picture

mpl.use("Agg")
import matplotlib.pyplot as plt

ABLATED = ("paper's order", "alone", "together", "left out")
INCREASES = (0.05, 0.1, 0.2)  # of perplexity, for which the summary names a sparsity
SPEEDS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "decode-h100.csv"
LARGE = "llama-3.1-8b"  # whose shapes those speeds are of
KINDS = {"stored": "#000000", "int8": PALETTE[0], "int4": PALETTE[1], "int4, compensated": PALETTE[3]}
MARKERS = "ov^sDPX*"  # by sparsity
NOTHING = 1e-6  # nats a token: a KL below it is float32's rounding, which a logarithm shall not show


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Draw comparisons."""

    folders: Positional[tuple[Path, ...]]
    out: Path
    form: str = "png"  # or svg, pdf


def main() -> None:
    """Draw and write everything that there are rows for."""
    args = tyro.cli(Arguments, description=__doc__)
    try:
        rows = read_rows(args.folders, ["comparison.csv", "sweep.csv"])
    except WisparseError as problem:
        sys.exit(f"plot_comparison: {problem}")
    if not rows:
        sys.exit(f"plot_comparison: no tables in {', '.join(map(str, args.folders))}")
    args.out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, figure in figures(rows):
            file = args.out / f"{_file_name(name)}.{args.form}"
            figure.savefig(file)
            plt.close(figure)
            print(file)
    for name, picture in pictures(rows):
        (args.out / name).write_bytes(picture)
        print(args.out / name)
    text = summary(rows)
    (args.out / "summary.md").write_text(text, encoding="utf-8")
    print(text)


def pictures(rows: list[Row]) -> Iterator[tuple[str, bytes]]:
    """Names and PNGs of the methods beside each other, for light and for dark pages, as `wisparse sweep` draws them."""
    for (model, calibration, evaluation), own in grouped(rows, ("model", "calibration", "evaluation")):
        methods = [row for row in own if row["group"] == "method"]
        for dark in (False, True) if methods else ():
            name = f"{Path(str(model)).name} {calibration} {evaluation} picture{' dark' * dark}"
            yield f"{_file_name(name)}.png", quality_picture(methods, dark)


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def figures(rows: list[Row]) -> Iterator[tuple[str, Any]]:
    """The figures to draw, by the names of their files."""
    for (model, calibration, evaluation), own in grouped(rows, ("model", "calibration", "evaluation")):
        texts, name = f"{calibration} → {evaluation}", Path(str(model)).name
        where = f"{name} {calibration} {evaluation}"
        if methods := [row for row in own if row["group"] == "method"]:
            for column, label in (("kl", KL), ("perplexity", "perplexity")):
                figure, axes = _titled(f"{name}, {texts}")
                draw_against_sparsity(axes, methods, column, label)
                yield f"{where} {column}", figure
        if rounded := [row for row in own if row["group"] == "weights"]:
            yield f"{where} weights", quality_of_weights(rounded)
        for (sparsity,), same in grouped(own, ("sparsity",)):
            title = f"{name} at {sparsity:.0%}, {texts}"
            if ablated := [row for row in same if row["group"] in ABLATED]:
                yield f"{where} {sparsity:g} ablations", bars(ablated, same, title)
            if spent := [row for row in same if row["group"].startswith("allocator")]:
                yield f"{where} {sparsity:g} cost", cost_against_quality(spent, title)


def _titled(title: str, size: tuple[float, float] = (4.8, 3.6)) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=size)
    axes.set_title(title, fontsize=8, wrap=True)
    return figure, axes


def bars(rows: list[Row], all_rows: list[Row], title: str) -> Any:
    """KL of every variant, by group, beside TEAL's."""
    groups = grouped(rows, ("group",))
    count = len({row["variant"] for row in rows}) + len(groups)
    figure, axes = _titled(title, (6.0, 0.8 + 0.24 * count))
    at, ticks = 0.0, []
    for ((_,), own), shade in zip(groups, itertools.cycle((PALETTE[2], PALETTE[0], PALETTE[3], GREY))):
        for (name,), same in grouped(own, ("variant",)):
            value, width = mean(same, "kl"), mean(same, "kl_error")
            axes.barh(at, value, xerr=width, color=shade, height=0.8)
            axes.text(value + width, at, f" {value:.3f}", va="center", fontsize=7)
            ticks.append((at, name))
            at += 1
        at += 0.7
    if teal := [row for row in all_rows if row["variant"] == "teal"]:
        axes.axvline(mean(teal, "kl"), color="black", lw=0.8, ls=":", label="teal")
        axes.legend(fontsize=8)
    axes.set_yticks([y for y, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel=KL)
    axes.grid(axis="y", visible=False)
    return figure


def cost_against_quality(rows: list[Row], title: str) -> Any:
    """Each allocator a point: forward tokens spent, KL reached."""
    figure, axes = _titled(title)
    axes.set_xscale("log")
    for (name,), own in grouped(rows, ("variant",)):
        tokens, kl, label = mean(own, "forward_tokens"), mean(own, "kl"), name.rpartition(": ")[2]
        if tokens > 0:
            axes.errorbar(tokens, kl, mean(own, "kl_error"), marker="o", ms=5, color=colour(label))
            axes.annotate(f" {label}", (tokens, kl), fontsize=8, va="bottom")
        else:
            axes.axhline(kl, color=GREY, lw=0.8, ls=":")
            axes.annotate(f"{label} (free)", (0.02, kl), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    axes.margins(x=0.3)
    axes.set(xlabel="tokens through the model, for budgets", ylabel=KL)
    return figure


def curves(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by kind of weights, from the sparsest on; of rows with one sparsity the one with the least KL."""
    return {
        kind: [
            min(same, key=lambda row: row["kl"])
            for _, same in sorted(grouped(own, ("sparsity",)), key=lambda item: item[0], reverse=True)
        ]
        for (kind,), own in grouped(rows, ("weights",))
    }


def gigabytes(row: Row) -> float:
    """What a token reads at the large model's shapes with the row's weights and realised sparsity."""
    return token_bytes(_large(), *formats_of(row["weights"], row["head"]), float(row["realised"])) / 1e9


def speeds(file: Path = SPEEDS) -> dict[tuple[str | None, str | None, float], float]:
    """Tokens a second measured at the large model's shapes, by formats of weights and head, and sparsity."""
    measured = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            weights, head = (None if row[part] == "bfloat16" else row[part] for part in ("weights", "head"))
            measured[weights, head, float(row["sparsity"])] = float(row["tokens_per_second"])
    return measured


def quality_of_weights(rows: list[Row]) -> Any:
    """KL against bytes and against speed: a line for each kind of weights, a marker for each sparsity."""
    measured, lines = speeds(), curves(rows)
    marks = dict(zip(sorted({row["sparsity"] for row in rows}), MARKERS, strict=False))
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for kind, own in lines.items():
        drawn = [row for row in own if row["kl"] > NOTHING]
        fast = [measured.get((*formats_of(kind, row["head"]), row["sparsity"])) for row in drawn]
        for panel, xs in zip(panels, ([gigabytes(row) for row in drawn], fast), strict=True):
            points = [(x, row) for x, row in zip(xs, drawn, strict=True) if x is not None]
            shade = KINDS.get(kind, PALETTE[4])
            label = "bfloat16" if kind == "stored" else kind
            panel.plot([x for x, _ in points], [row["kl"] for _, row in points], color=shade, label=label)
            for x, row in points:
                marker = {"marker": marks[row["sparsity"]], "markersize": 6, "capsize": 2, "color": shade}
                panel.errorbar(x, row["kl"], row["kl_error"], **marker)
    for panel, label in zip(panels, ("GB read a token", "tok/s on one H100, batch 1"), strict=True):
        panel.set(xlabel=f"{label}, Llama-3.1-8B shapes", yscale="log")
    panels[0].set_ylabel("KL(dense ‖ it), nats per token")
    panels[0].legend()
    for target, mark in marks.items():
        panels[1].plot([], [], mark, color="grey", label=f"{target:.0%} skipped")
    panels[1].legend(handles=panels[1].get_legend_handles_labels()[0][len(lines) :])
    return figure


def summary(rows: list[Row]) -> str:
    """Everything as tables in Markdown, means over seeds."""
    lines = [
        "The second half of every window runs sparse and is scored. KL(dense || sparse) in nats per token; ± is one "
        "standard error over windows and, where there are several, seeds; the difference to TEAL is paired over "
        "windows. Forward tokens count a backward pass as two, not the exponent search nor held-out windows. Like "
        "seconds, compilation included, they add up over the sparsities of a run in their order.\n"
    ]
    for (model, calibration, evaluation), same in grouped(rows, ("model", "calibration", "evaluation")):
        lines.append(f"## {Path(str(model)).name}, calibrated on {calibration}, evaluated on {evaluation}\n")
        if rounded := [row for row in same if row["group"] == "weights"]:
            lines.append(table_of_weights(rounded))
        if methods := [row for row in same if row["group"] != "weights"]:
            lines.append(
                f"{mean(methods, 'calibration_tokens'):,.0f} tokens of calibration text, "
                f"{mean(methods, 'evaluation_tokens'):,.0f} scored; dense perplexity "
                f"{mean(methods, 'dense_perplexity'):.3f}\n\n{table(methods)}"
            )
            if len({row["sparsity"] for row in methods}) > 1:
                lines.append(f"Sparsity at a given increase of perplexity:\n\n{table_of_increases(methods)}")
    return "\n".join(lines)


def table_of_increases(rows: list[Row]) -> str:
    """The sparsity at which the perplexity of each variant is higher by a share."""
    lines = ["| variant | " + " | ".join(f"+{p:.0%}" for p in INCREASES) + " |", "|---" * (len(INCREASES) + 1) + "|"]
    for (name,), own in grouped(rows, ("variant",)):
        points = sorted((target, mean(same, "perplexity")) for (target,), same in grouped(own, ("sparsity",)))
        values = [sparsity_at(points, mean(own, "dense_perplexity"), increase) for increase in INCREASES]
        lines.append(f"| {name} | " + " | ".join("-" if math.isnan(x) else f"{x:.3f}" for x in values) + " |")
    return "\n".join(lines) + "\n"


def sparsity_at(points: list[tuple[float, float]], dense: float, increase: float) -> float:
    """The sparsity at which perplexity is `increase` above the dense one: its logarithm interpolated between the
    measured points, from dense at 0 on; nan beyond the last of them.

    Args:
        points: sparsity and perplexity, ascending.
        dense: perplexity.
        increase: share of it.
    """
    wanted = math.log1p(increase)
    curve = [(0.0, 0.0)] + [(p, math.log(perplexity / dense)) for p, perplexity in points]
    for (before, low), (after, high) in itertools.pairwise(curve):
        if low <= wanted < high:
            return before + (after - before) * (wanted - low) / (high - low)
    return math.nan


def table_of_weights(rows: list[Row]) -> str:
    """Every kind of weights at every sparsity, with what a token reads and how fast the large model's shapes decode."""
    titles = ("weights", "basis", "sparsity", "perplexity", "KL, nats/token", "MB a token", "GB at 8B", "tok/s at 8B")
    lines, measured = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"], speeds()
    for (kind, basis, target, head), own in grouped(rows, ("weights", "basis", "sparsity", "head")):
        speed = measured.get((*formats_of(kind, head), target))
        lines.append(
            f"| {kind} | {basis}'s | {mean(own, 'realised'):.3f} | {mean(own, 'perplexity'):.2f} ± "
            f"{error(own, 'perplexity'):.2f} | {mean(own, 'kl'):.4f} ± {error(own, 'kl'):.4f} | "
            f"{mean(own, 'megabytes'):.1f} | {mean([{'gb': gigabytes(row)} for row in own], 'gb'):.2f} | "
            f"{'' if speed is None else f'{speed:.0f}'} |"
        )
    return "\n".join(lines) + "\n"


def _large() -> Any:
    return read_config(shapes()[LARGE])


if __name__ == "__main__":
    main()
