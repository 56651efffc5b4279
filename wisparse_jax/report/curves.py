"""Figures of comparisons: quality against sparsity, a line a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wisparse_jax.report.canvas import GREY, OTHERS, PAGES, PALETTE, drawn, page_style
from wisparse_jax.report.comparison import Row, grouped, mean

# A method has the same colour in every figure.
COLOURS = {
    "uniform": GREY, "wina": PALETTE[1], "teal": PALETTE[0], "wisparse": PALETTE[2], "wisparse-paper": PALETTE[4],
    "wisparse-plus": PALETTE[3],
}  # fmt: skip
STYLE: Any = {
    "figure.dpi": 150, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip
KL = "KL(dense ‖ sparse), nats per token"


def quality_picture(rows: Sequence[Row], dark: bool = False) -> bytes:
    """KL and perplexity against sparsity, beside each other, as a PNG of 1,350 by 510 dots for a light or dark page.

    Args:
        rows: of one model and one pair of texts; means over seeds.
        dark: the page.
    """

    def draw(canvas: Any) -> None:
        for axes, (column, text) in zip(canvas.subplots(1, 2), (("kl", KL), ("perplexity", "perplexity")), strict=True):
            draw_against_sparsity(axes, rows, column, text, PAGES[dark][1])
        canvas.suptitle(_title(rows), fontsize=10)

    return drawn(draw, STYLE | page_style(dark), figsize=(9, 3.4))


def _title(rows: Sequence[Row]) -> str:
    first = rows[0]
    names = [text if text != "self" else "its own text" for text in (first["calibration"], first["evaluation"])]
    texts = f"calibrated on {names[0]}, measured on {names[1]}"
    return f"{Path(str(first['model'])).name}, {texts}, {first['evaluation_tokens']:,.0f} tokens"


def draw_against_sparsity(axes: Any, rows: Sequence[Row], column: str, label: str, ink: str = "black") -> None:
    """A line for each method, means over seeds; KL and perplexity on logarithmic axes, dense where there is a value."""
    for (name,), own in grouped(rows, ("variant",)):
        points = sorted(grouped([row for row in own if row.get(column) is not None], ("sparsity",)))
        if not points:
            continue
        # What was skipped on that text, not what was aimed at: plans differ in how far they fall short of it.
        x = [100 * mean(same, "realised") for _, same in points]
        y = [mean(same, column) for _, same in points]
        errors = [mean(same, f"{column}_error") for _, same in points]
        # A perplexity's error is that of the text, the same for all lines.
        shown = None if column == "perplexity" or np.isnan(errors).any() else errors
        axes.errorbar(x, y, shown, color=colour(name), marker="o", ms=3.5, lw=1.4, label=name)
    if column != "kl":
        axes.axhline(mean(rows, f"dense_{column}"), color=ink, lw=0.8, ls=":", label="dense")
    logarithmic(axes.yaxis)
    axes.set(xlabel="realised sparsity, %", ylabel=label)
    axes.legend(fontsize=8)


def logarithmic(axis: Any) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    from matplotlib import ticker

    axes, which = axis.axes, axis.axis_name
    (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(ticker.NullFormatter())


def colour(name: str) -> str:
    """The colour of a method or variant."""
    return COLOURS.get(name) or OTHERS[sum(map(ord, name)) % len(OTHERS)]
