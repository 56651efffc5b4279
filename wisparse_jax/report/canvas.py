"""Matplotlib for figures in files: no backend, none of a user's settings, and names as they are written."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

# Okabe and Ito's colours, which colour-blind readers can tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")
GREY, OTHERS = "#999999", ("#CC79A7", "#000000", "#F0E442")
PAGES = {False: ("#ffffff", "#1f2328"), True: ("#0d1117", "#e6e8eb")}  # page and ink, light and dark


def page_style(dark: bool) -> dict[str, str]:
    """Matplotlib's settings for the colours of a light or a dark page and of what is drawn on it."""
    page, ink = PAGES[dark]
    inked = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor", "text.color")
    papered = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    return {**dict.fromkeys(inked, ink), **dict.fromkeys(papered, page)}


def drawn(draw: Callable[[Any], object], style: Mapping[str, Any], **figure: Any) -> bytes:
    """What `draw` puts on a new figure, as a PNG of 150 dots an inch.

    Args:
        draw: called with the figure.
        style: settings of matplotlib beside its defaults.
        figure: arguments of the figure.
    """
    matplotlib = import_matplotlib()
    from matplotlib.figure import Figure

    # A backend is what shows figures on a screen: asking for the default of it would look for one.
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")}
    with matplotlib.rc_context(defaults | {"text.parse_math": False} | dict(style)):
        canvas = Figure(**figure)
        draw(canvas)
        out = io.BytesIO()
        canvas.savefig(out, format="png", dpi=150)
    return out.getvalue()


def label(name: str) -> str:
    """A name for a legend, which leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def import_matplotlib() -> ModuleType:
    """Matplotlib, also where the environment names a backend or settings that it cannot be imported with."""
    try:
        return importlib.import_module("matplotlib")
    except ValueError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]  # what the failed import has left
        spec = importlib.util.find_spec("matplotlib")
        folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
        with _environment(MPLBACKEND="agg", MATPLOTLIBRC=str(folder / "mpl-data" / "matplotlibrc")):
            return importlib.import_module("matplotlib")


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})
