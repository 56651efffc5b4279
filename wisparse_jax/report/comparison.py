"""Comparisons of methods as rows of a table: a row a plan and evaluation text, written as CSV as they come."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from wisparse_jax.calibration import SearchSettings
from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation import Evaluation
from wisparse_jax.report.tables import STAGES
from wisparse_jax.sparsity import SparsityPlan

COLUMNS = (
    "model", "group", "variant", "method", "switches", "sparsity", "calibration", "evaluation", "seed",
    "calibration_tokens", "evaluation_tokens", "kl", "kl_error", "perplexity", "perplexity_error", "dense_perplexity",
    "realised", "realised_error", "realised_calibration", "minus_teal", "minus_teal_error", "teal_ratio", "held_out_kl",
    "blimp", "dense_blimp", "blimp_pairs", "forward_tokens", "seconds",
    *(f"seconds_{stage.replace(' ', '_')}" for stage in STAGES),
)  # fmt: skip
# Cells that stay text where they look like a number.
TEXTS = ("model", "group", "variant", "method", "switches", "calibration", "evaluation", "layer", "plan")
NEEDED = ("model", "sparsity", "group", "variant")  # not empty; the first two are in every table
EVALUATION_SEED = 1000  # of sampled text, the same for every calibration seed
Row = dict[str, Any]


def key(name: str, target: float) -> str:
    """What an evaluation calls the plan of a variant and a target."""
    return f"{name} {target:g}"


def figures(result: Evaluation, name: str, target: float, plan: SparsityPlan) -> Row:
    """What was measured of a plan, beside TEAL's of the same target where that was measured too."""
    score, teal = result.sparse[key(name, target)], key("teal", target)
    row: Row = {
        "evaluation_tokens": result.tokens,
        "kl": score.divergence.mean, "kl_error": score.divergence.error,
        "perplexity": score.perplexity.mean, "perplexity_error": score.perplexity.error,
        "dense_perplexity": result.dense.perplexity.mean,
        "realised": score.sparsity.mean, "realised_error": score.sparsity.error,
        "realised_calibration": plan.mean_realised,
        "held_out_kl": plan.held_out.get("plan", {}).get("kl"),
        "forward_tokens": plan.held_out["forward_tokens"],
        "seconds": sum(plan.timings.values()),
    }  # fmt: skip
    if teal in result.sparse:
        gap = result.paired(key(name, target), teal)
        row |= {"minus_teal": gap.mean, "minus_teal_error": gap.error}
        row["teal_ratio"] = score.divergence.mean / result.sparse[teal].divergence.mean
    return row | {f"seconds_{stage.replace(' ', '_')}": took for stage, took in plan.timings.items()}


def append_rows(file: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Add rows to a CSV file, which begins with the columns' names."""
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns, restval="")
        if new:
            writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def read_rows(folders: Sequence[Path], names: Sequence[str]) -> list[Row]:
    """The rows of tables of several folders; cells that are numbers as numbers, empty ones as None.

    Raises:
        WisparseError: a file that is no table, a row with more or fewer cells than the first line names, or a cell that
            is not what its column holds.
    """
    rows = []
    for file in (folder / name for folder in folders for name in names):
        if not file.is_file():
            continue
        try:
            with file.open(newline="", encoding="utf-8-sig") as found:
                table = csv.DictReader(found)
                columns = table.fieldnames or []
                if len(set(columns)) < len(columns) or not set(NEEDED[:2]) <= set(columns):
                    raise WisparseError(f"{file}: line 1: expected names, none twice, with {' and '.join(NEEDED[:2])}")
                for number, row in enumerate(table, 1):
                    rows.append(_checked(row, f"{file}: row {number}"))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise WisparseError(f"{file}: expected a table of comma-separated values in UTF-8: {error}") from None
    return rows


def _checked(row: dict[str, Any], where: str) -> Row:
    """The cells of a row as numbers or text."""
    if None in row or None in row.values():
        raise WisparseError(f"{where}: expected a cell for each of the names in line 1")
    values = {name: _value(name, cell) for name, cell in row.items()}
    for name, value in values.items():
        if (name in NEEDED and value is None) or (name not in TEXTS and isinstance(value, str)):
            kind = "text" if name in TEXTS else "a number"
            raise WisparseError(f"{where}: {name}: expected {kind}, found {row[name]!r}")
    return values


def _value(name: str, cell: str) -> Any:
    for kind in (int, float) if name not in TEXTS else ():
        with contextlib.suppress(ValueError):
            return kind(cell) if cell else None
    return cell or None


def conditions(settings: SearchSettings) -> dict[str, Any]:
    """Where and with what a comparison was run."""
    import jax

    import wisparse_jax

    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "evosax")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{len(jax.local_devices())} x {jax.devices()[0].device_kind}",
        "versions": {"wisparse_jax": wisparse_jax.__version__} | {name: version(name) for name in packages},
        "settings": dataclasses.asdict(settings),
    }


def grouped(rows: Iterable[Row], names: Sequence[str]) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Rows by the values of some columns, in the order in which these come first."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(found.items())


def mean(rows: Sequence[Row], column: str) -> float:
    """Of a column, over the rows that have it; nan if none has."""
    values: list[float] = [row[column] for row in rows if row.get(column) is not None]
    return float(np.mean(values)) if values else math.nan
