"""The figure of scripts/quality_table.py's quality.csv.

    python scripts/plot_quality.py docs/benchmarks/formats-smollm2.csv --out docs/images/formats.png

KL against the bytes that a token reads at Llama-3.1-8B shapes, and against the tokens a second measured at them; a line
for each kind of weights, a marker for each sparsity, bars of one standard error. Of dense rows the better
basis is drawn. Needs matplotlib.
"""

from __future__ import annotations

import csv
import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import tyro
from tyro.conf import Positional

mpl.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {"bfloat16": "#000000", "int8": "#0072B2", "int4": "#E69F00", "int4, compensated": "#D55E00"}
MARKERS = "ov^sDPX*"  # by sparsity
NOTHING = 1e-6  # nats a token: a KL below it is float32's rounding, which a logarithm shall not show
AXES = {"gigabytes_8b": "GB read a token", "tokens_per_second_8b": "tok/s on one H100, batch 1"}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Draw quality against bytes and speed."""

    table: Positional[Path]
    out: Path


def main() -> None:
    """Draw both panels."""
    args = tyro.cli(Arguments, description=__doc__)
    with args.table.open(newline="", encoding="utf-8") as file:
        lines = curves(list(csv.DictReader(file)))
    plt.rcParams.update({"figure.dpi": 150, "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    figure, panels = plt.subplots(1, len(AXES), figsize=(9, 3.8), sharey=True, constrained_layout=True)
    targets = sorted({row["target"] for rows in lines.values() for row in rows})
    marks = dict(zip(targets, MARKERS, strict=False))
    for panel, (column, label) in zip(panels, AXES.items(), strict=True):
        for kind, rows in lines.items():
            drawn = [row for row in rows if row[column] and row["kl"] > NOTHING]
            panel.plot([row[column] for row in drawn], [row["kl"] for row in drawn], color=COLOURS[kind], label=kind)
            for row in drawn:
                how = {"marker": marks[row["target"]], "markersize": 6, "capsize": 2, "color": COLOURS[kind]}
                panel.errorbar(row[column], row["kl"], row["kl_error"], **how)
        panel.set(xlabel=f"{label}, Llama-3.1-8B shapes", yscale="log")
    panels[0].set_ylabel("KL(dense || it), nats a token")
    panels[0].legend(frameon=False)
    for target, mark in marks.items():
        panels[1].plot([], [], mark, color="grey", label=f"{target:.0%} skipped")
    panels[1].legend(handles=panels[1].get_legend_handles_labels()[0][len(lines) :], frameon=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, bbox_inches="tight")


def curves(rows: list[dict[str, str]]) -> dict[str, list[dict[str, Any]]]:
    """Numbers by kind of weights, from the sparsest on; of rows with one target the one with the least KL."""
    best: dict[str, dict[float, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        numbers = {k: float(v) if v else None for k, v in row.items() if k not in ("weights", "basis")}
        target, kl = numbers["target"], numbers["kl"]
        assert target is not None and kl is not None
        found = best[row["weights"]].get(target)
        if found is None or kl < found["kl"]:
            best[row["weights"]][target] = numbers
    return {kind: [own[target] for target in sorted(own, reverse=True)] for kind, own in best.items()}


if __name__ == "__main__":
    main()
