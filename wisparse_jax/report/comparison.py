"""Plans and texts as rows of a table, the one way from both to figures: rows are kept as CSV, and shown as Markdown."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from wisparse_jax.benchmark.cost import token_bytes
from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation import Evaluation, evaluate, rivals_of
from wisparse_jax.models.model import Model
from wisparse_jax.models.quantise import quantise
from wisparse_jax.report.tables import ROWS
from wisparse_jax.search import SearchSettings
from wisparse_jax.sparsity import SparsityPlan
from wisparse_jax.sparsity.apply import apply, in_basis

COLUMNS = (
    "model", "group", "variant", "method", "switches", "weights", "head", "basis", "sparsity", "calibration",
    "evaluation", "seed", "calibration_tokens", "evaluation_tokens", "kl", "kl_error", "perplexity", "perplexity_error",
    "dense_perplexity", "realised", "realised_error", "realised_calibration", "kl_at_teal", "minus_teal",
    "minus_teal_error", "teal_ratio", "held_out_kl", "megabytes", "forward_tokens", "seconds",
    *(f"seconds_{stage.replace(' ', '_')}" for stage in ROWS),
)  # fmt: skip
# Cells that stay text where they look like a number.
TEXTS = ("model", "group", "variant", "method", "switches", "weights", "head", "basis", "calibration", "evaluation")
NEEDED = ("model", "sparsity", "group", "variant")  # not empty; the first two are in every table
EVALUATION_SEED = 1000  # of sampled text, the same for every calibration seed
STORED, COMPENSATED = "stored", ", compensated"  # kinds of weights: as they are, and the end of one rounded by a text
Row = dict[str, Any]
Windows = Int[np.ndarray, "windows length"]


def compare(
    model: Model,
    plans: Mapping[tuple[str, float], SparsityPlan],
    texts: Mapping[str, Windows],
    weights: Sequence[str] = (STORED,),
    head: str | None = None,
    rounded_by: Windows | None = None,
    progress: bool = False,
) -> list[Row]:
    """A row for each kind of weights, text and plan, all measured against the model as it is on the same tokens.

    Args:
        model: dense.
        plans: by variant and target. Where "teal" is one of the variants, rows have the KL at the share that it skips
            on the text, and the difference to its own, paired over windows.
        texts: windows of token ids by name.
        weights: kinds of block weights: "stored", or a format that they are rounded to after a plan's basis is folded
            in, such as "int8", also "int4, compensated", which makes up for the errors on a text. Where it is not
            "stored" alone, the dense model has a row too, in its own basis and in the plans': variant "dense",
            sparsity 0.
        head: "int8" rounds the head of every kind but "stored".
        rounded_by: the windows of the text that "compensated" rounds by.
        progress: show progress bars on standard error.

    Raises:
        WisparseError: as `apply`, `quantise` and `evaluate` raise it.
    """
    rows = []
    for kind in weights:
        models = _models(model, plans, kind, head, rounded_by, dense=tuple(weights) != (STORED,))
        for text, windows in texts.items():
            measured = {name: one for name, (*_, one) in models.items()}
            rivals = {name: rival for name, rival in rivals_of(measured).items() if rival.startswith("teal ")}
            result = evaluate(model, windows, measured, progress=progress, rivals=rivals)
            for name, (variant, target, basis, _) in models.items():
                plan, (blocks, rounded_head) = plans.get((variant, target)), formats_of(kind, head)
                if plan is not None and plan.planes is not None:
                    blocks = plan.planes.format
                read = token_bytes(model.config, blocks, rounded_head, result.sparse[name].sparsity.mean)
                row = {"variant": variant, "sparsity": target, "evaluation": text, "basis": basis}
                row |= {"weights": blocks if kind == STORED and blocks else kind, "head": rounded_head}
                rows.append(row | {"megabytes": read / 1e6} | _figures(result, name, target, plan))
    return rows


def _models(
    model: Model,
    plans: Mapping[tuple[str, float], SparsityPlan],
    kind: str,
    head: str | None,
    rounded_by: Windows | None,
    dense: bool,
) -> dict[str, tuple[str, float, str, Model]]:
    """The models in weights of a kind by name, each behind its variant, its target and whose basis it is in."""
    wanted, by_text = formats_of(kind, head), rounded_by if kind.endswith(COMPENSATED) else None
    models: dict[str, tuple[str, float, str, Model]] = {}
    digests = {which: None if plan.basis is None else plan.basis.digest() for which, plan in plans.items()}
    bases = ({None: None} if dense else {}) | {digests[which]: plan.basis for which, plan in plans.items()}
    for digest, basis in bases.items():
        dense_model = in_basis(model, basis)
        if kind != STORED:
            dense_model = quantise(dense_model, *wanted, by_text)
        whose = "model" if digest is None else "plan"
        if dense:
            models[f"dense, {digest}"] = "dense", 0.0, whose, dense_model
        here = {which: plan for which, plan in plans.items() if digests[which] == digest}
        sparse = apply(dense_model, {_key(*which): plan for which, plan in here.items()})
        models |= {_key(*which): (*which, whose, sparse[_key(*which)]) for which in here}
    return {_key(*which): models[_key(*which)] for which in plans} | models if not dense else models


def formats_of(kind: str, head: str | None) -> tuple[str | None, str | None]:
    """The formats of the block weights and of the head."""
    return (None, None) if kind == STORED else (kind.removesuffix(COMPENSATED), head)


def _key(variant: str, target: float) -> str:
    return f"{variant} {target:g}"


def _figures(result: Evaluation, name: str, target: float, plan: SparsityPlan | None) -> Row:
    """What was measured of one model, beside TEAL's of the same target where that was measured too."""
    score, teal = result.sparse[name], _key("teal", target)
    row: Row = {
        "evaluation_tokens": result.tokens,
        "kl": score.kl.mean, "kl_error": score.kl.error,
        "perplexity": score.perplexity.mean, "perplexity_error": score.perplexity.error,
        "dense_perplexity": result.dense.perplexity.mean,
        "realised": score.sparsity.mean, "realised_error": score.sparsity.error,
    }  # fmt: skip
    if name == teal or name in result.rivals:
        gap, at = result.paired(name, teal), result.matched.get(name, score)
        row |= {"kl_at_teal": at.kl.mean, "minus_teal": gap.mean, "minus_teal_error": gap.error}
        row["teal_ratio"] = 1.0 if name == teal else result.ratio(name)
    if plan is None:
        return row
    row |= {
        "method": plan.method,
        "realised_calibration": plan.mean_realised,
        "held_out_kl": plan.held_out.get("plan", {}).get("kl"),
        "forward_tokens": plan.held_out["forward_tokens"],
        "seconds": sum(plan.timings.values()),
    }
    return row | {f"seconds_{stage.replace(' ', '_')}": took for stage, took in plan.timings.items() if stage in ROWS}


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


def table(rows: Sequence[Row]) -> str:
    """Rows of one sparsity or several in Markdown, a line a variant and sparsity; means over seeds.

    ± is one standard error over windows and, where there are several, seeds.
    """
    titles = [
        "variant",
        "sparsity",
        "KL",
        "KL at TEAL's share",
        "of TEAL's",
        "minus TEAL",
        "perplexity",
        "realised",
        "forward tokens",
        "seconds",
    ]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for (name, target), own in grouped(rows, ("variant", "sparsity")):
        gap, gap_error, ratio = mean(own, "minus_teal"), error(own, "minus_teal"), mean(own, "teal_ratio")
        cells = [
            name,
            f"{target:.0%}",
            f"{mean(own, 'kl'):z.4f} ± {error(own, 'kl'):.4f}",
            "-" if math.isnan(ratio) else f"{mean(own, 'kl_at_teal'):z.4f}",
            "-" if math.isnan(ratio) else f"{ratio:.3f}",
            "-" if math.isnan(gap) or gap == gap_error == 0 else f"{gap:+z.4f} ± {gap_error:.4f}",
            f"{mean(own, 'perplexity'):.2f} ± {error(own, 'perplexity'):.2f}",
            f"{mean(own, 'realised'):.4f}",
            f"{mean(own, 'forward_tokens'):,.0f}",
            f"{mean(own, 'seconds'):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def grouped(rows: Iterable[Row], names: Sequence[str]) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Rows by the values of some columns, in the order in which these come first."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.items())


def mean(rows: Sequence[Row], column: str) -> float:
    """The mean of a column over the rows that have it; nan if none has."""
    values: list[float] = [row[column] for row in rows if row.get(column) is not None]
    return float(np.mean(values)) if values else math.nan


def error(rows: Sequence[Row], column: str) -> float:
    """The standard error of a column's mean over seeds.

    Their windows are the same, so the errors over windows do not average out; the spread between seeds does.
    """
    if any(row.get(name) is None for row in rows for name in (column, f"{column}_error")):
        return math.nan
    values: list[float] = [row[column] for row in rows]
    errors: list[float] = [row[f"{column}_error"] for row in rows]
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(rows)) if len(rows) > 1 else 0.0
    return math.hypot(float(np.mean(errors)), spread)
