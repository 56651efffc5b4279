"""The sparsity plan: what a search produces and a model is run with."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from wisparse_jax.errors import PlanError
from wisparse_jax.models.config import LAYERS

FORMAT = 1
PLAN_FILE = "plan.json"
_NUMBERS = ("exponent", "sparsity", "threshold")


@dataclasses.dataclass(frozen=True)
class SparsityPlan:
    """Per-layer exponents, sparsities and thresholds of one model.

    Rows are blocks, columns the layers in the order of `LAYERS`. `thresholds` are on the score: tau of
    `|x_i| * max(||W_i||^alpha, 1e-4) >= tau`. The sparsities' mean, weighted by each layer's number of weights
    (`layer_weights`), is `target`.
    """

    method: str
    target: float
    exponents: Float64[np.ndarray, "blocks 7"]
    sparsities: Float64[np.ndarray, "blocks 7"]
    thresholds: Float64[np.ndarray, "blocks 7"]
    layer_weights: tuple[int, ...]
    fingerprint: str
    seed: int
    calibration: dict[str, Any] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    timings: dict[str, float] = dataclasses.field(default_factory=dict)
    history: dict[str, Any] = dataclasses.field(default_factory=dict)
    version: str = ""

    @property
    def mean_sparsity(self) -> float:
        """The mean over all layers, weighted by parameter count."""
        weights = np.asarray(self.layer_weights, np.float64)
        return float((self.sparsities @ (weights / weights.sum())).mean())

    def check_model(self, fingerprint: str, num_blocks: int) -> None:
        """Refuse a model that the plan was not made for.

        Raises:
            PlanError: another number of blocks, or other weights.
        """
        if len(self.exponents) != num_blocks:
            raise PlanError(f"plan is for a model of {len(self.exponents)} blocks; this model has {num_blocks}")
        if self.fingerprint != fingerprint:
            raise PlanError(
                f"plan is for another model: its fingerprint is {self.fingerprint[:16]}, "
                f"this model's is {fingerprint[:16]}"
            )

    def save(self, path: str | Path) -> None:
        """Write the plan as a folder; it appears whole or not at all.

        Raises:
            PlanError: the folder exists already, or cannot be written.
        """
        path = Path(path)
        if path.exists():
            raise PlanError(f"{path}: exists already; a plan is never overwritten")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        except OSError as error:
            raise PlanError(f"{path}: cannot be written: {error}") from None
        try:
            text = json.dumps(self._as_json(), indent=1, allow_nan=False)
            (staging / PLAN_FILE).write_text(text + "\n", encoding="utf-8")
            staging.chmod(0o755)
            staging.rename(path)
        except OSError as error:
            raise PlanError(f"{path}: cannot be written: {error}") from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _as_json(self) -> dict[str, Any]:
        tables = dict(zip(_NUMBERS, (self.exponents, self.sparsities, self.thresholds), strict=True))
        blocks = [
            {name: {key: float(table[b, i]) for key, table in tables.items()} for i, name in enumerate(LAYERS)}
            for b in range(len(self.exponents))
        ]
        fields = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("exponents", "sparsities", "thresholds", "layer_weights")
        }
        weights = dict(zip(LAYERS, self.layer_weights, strict=True))
        return {"format": FORMAT, **fields, "layer_weights": weights, "blocks": blocks}

    @staticmethod
    def load(path: str | Path) -> SparsityPlan:
        """Read a plan and check every number in it.

        Raises:
            PlanError: not a plan, another format version, or damaged; names the file and the field.
        """
        path = Path(path)
        file = path / PLAN_FILE
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            found = "no such folder" if not path.exists() else f"no {PLAN_FILE} in it" if path.is_dir() else "a file"
            raise PlanError(f"{path}: expected a plan folder, found {found}") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"{file}: not readable as JSON: {error}") from None
        try:
            return _parse(raw)
        except PlanError as error:
            raise PlanError(f"{file}: {error}") from None


def _parse(raw: Any) -> SparsityPlan:
    if not isinstance(raw, dict) or "format" not in raw:
        raise PlanError("format: missing; this is not a sparsity plan")
    if raw["format"] != FORMAT:
        raise PlanError(f"format = {raw['format']!r}: this version reads format {FORMAT}")
    blocks = _field(raw, "blocks", list)
    if not blocks:
        raise PlanError("blocks: expected at least one, found none")
    tables = {key: np.zeros((len(blocks), len(LAYERS))) for key in _NUMBERS}
    upper = {"exponent": math.inf, "sparsity": 1.0, "threshold": math.inf}
    for b, block in enumerate(blocks):
        if not isinstance(block, dict) or set(block) != set(LAYERS):
            raise PlanError(f"blocks[{b}]: expected the layers {', '.join(LAYERS)}")
        for i, name in enumerate(LAYERS):
            for key in _NUMBERS:
                value = block[name].get(key) if isinstance(block[name], dict) else None
                where = f"blocks[{b}].{name}.{key}"
                tables[key][b, i] = _number(value, where, 0.0, upper[key])
    sizes = _field(raw, "layer_weights", dict)
    if set(sizes) != set(LAYERS):
        raise PlanError(f"layer_weights: expected the layers {', '.join(LAYERS)}")
    weights = tuple(int(_number(sizes[name], f"layer_weights.{name}", 1.0, math.inf)) for name in LAYERS)
    plan = SparsityPlan(
        method=_field(raw, "method", str),
        target=_number(raw.get("target"), "target", 0.0, 1.0),
        exponents=tables["exponent"],
        sparsities=tables["sparsity"],
        thresholds=tables["threshold"],
        layer_weights=weights,
        fingerprint=_field(raw, "fingerprint", str),
        seed=_field(raw, "seed", int),
        **{key: _field(raw, key, dict) for key in ("calibration", "settings", "timings", "history")},
        version=_field(raw, "version", str),
    )
    if abs(plan.mean_sparsity - plan.target) > 1e-6:
        raise PlanError(f"blocks: their mean sparsity is {plan.mean_sparsity:.6f}, but target = {plan.target}")
    return plan


def _field(raw: dict[str, Any], name: str, kind: type) -> Any:
    value = raw.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        found = "nothing" if name not in raw else type(value).__name__
        raise PlanError(f"{name}: expected {kind.__name__}, found {found}")
    return value


def _number(value: Any, where: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or value == math.inf:
        raise PlanError(f"{where}: expected a finite number from {low:g} to {high:g}, found {value!r}")
    return float(value)
