"""The tables of a comparison: their columns, and the Markdown summary."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from wisparse_jax.report.comparison import Row, grouped, mean

LAYER_COLUMNS = (
    "model", "variant", "sparsity", "calibration", "seed", "block", "layer", "layer_weights", "exponent",
    "layer_sparsity",
)  # fmt: skip
# Increases of perplexity for which the summary names a sparsity.
INCREASES = (0.05, 0.1, 0.2)


def write_summary(folder: Path, rows: list[Row], conditions: dict[str, Any]) -> None:
    """summary.md: the conditions and, for each pair of texts, a table for each sparsity; means over seeds."""
    versions = ", ".join(f"{name} {number}" for name, number in conditions["versions"].items())
    changed = ", ".join(f"{name} {value}" for name, value in conditions["settings"].items())
    lines = [
        f"# Methods compared on {conditions['model']}\n",
        f"Command: `{conditions['command']}`  ",
        f"Date: {conditions['date']}; {conditions['device']}; {conditions['dtype']}; {versions}  ",
        f"Settings: {changed}\n",
        "The second half of every window runs sparse and is scored. KL(dense || sparse) in nats per token; ± is one "
        "standard error over windows and, where there are several, seeds; the difference to TEAL is paired over "
        "windows. Forward tokens count a backward pass as two, not the exponent search nor held-out windows. Like "
        "seconds, compilation included, they add up over the sparsities of a run in their order.\n",
    ]
    for texts, same in grouped(rows, ("calibration", "evaluation")):
        lines.append(f"## Calibrated on {texts[0]}, evaluated on {texts[1]}\n")
        sizes = f"{same[0]['calibration_tokens']} tokens of calibration text, {same[0]['evaluation_tokens']} scored"
        lines.append(f"{sizes}; dense perplexity {same[0]['dense_perplexity']:.3f}\n")
        for (sparsity,), part in grouped(same, ("sparsity",)):
            lines += [f"### {sparsity:.0%}\n", *_table(part), ""]
        if len({row["sparsity"] for row in same}) > 1:
            lines += ["### Sparsity at a given increase of perplexity\n", *_reached(same), ""]
    (folder / "summary.md").write_text("\n".join(lines), encoding="utf-8")


def _error(rows: list[Row], column: str) -> float:
    """Of a mean over seeds: their windows are the same, so their errors do not average out; their spread does."""
    if any(row.get(name) is None for row in rows for name in (column, f"{column}_error")):
        return math.nan
    values: list[float] = [row[column] for row in rows]
    errors: list[float] = [row[f"{column}_error"] for row in rows]
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(rows)) if len(rows) > 1 else 0.0
    return math.hypot(float(np.mean(errors)), spread)


def _table(rows: list[Row]) -> list[str]:
    tasks = any(row.get("blimp") is not None for row in rows)
    titles = ["variant", "KL", "of TEAL's", "minus TEAL", "perplexity", "realised", "forward tokens", "seconds"]
    cells: list[Callable[[list[Row]], str]] = [
        lambda own: f"{mean(own, 'kl'):.4f} ± {_error(own, 'kl'):.4f}",
        lambda own: _or_dash(mean(own, "teal_ratio"), ".3f"),
        lambda own: _pair(mean(own, "minus_teal"), _error(own, "minus_teal")),
        lambda own: f"{mean(own, 'perplexity'):.2f} ± {_error(own, 'perplexity'):.2f}",
        lambda own: f"{mean(own, 'realised'):.4f}",
        lambda own: f"{mean(own, 'forward_tokens'):,.0f}",
        lambda own: f"{mean(own, 'seconds'):.0f}",
    ]
    if tasks:
        titles.append(f"BLiMP (dense {mean(rows, 'dense_blimp'):.4f})")
        cells.append(lambda own: _or_dash(mean(own, "blimp"), ".4f"))
    out = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for (name,), own in grouped(rows, ("variant",)):
        out.append("| " + " | ".join([name, *(cell(own) for cell in cells)]) + " |")
    return out


def _or_dash(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _pair(value: float, error: float) -> str:
    return "-" if math.isnan(value) or value == error == 0 else f"{value:+.4f} ± {error:.4f}"


def _reached(rows: list[Row]) -> list[str]:
    out = ["| variant | " + " | ".join(f"+{p:.0%}" for p in INCREASES) + " |", "|---" * (len(INCREASES) + 1) + "|"]
    for (name,), own in grouped(rows, ("variant",)):
        points = sorted((target, mean(same, "perplexity")) for (target,), same in grouped(own, ("sparsity",)))
        dense = mean(own, "dense_perplexity")
        found = [sparsity_at(points, dense, increase) for increase in INCREASES]
        out.append(f"| {name} | " + " | ".join(_or_dash(value, ".3f") for value in found) + " |")
    return out


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
