"""Plans on disk: a folder with a plan.json to read, its history, and the tensors that the plan has.

Exponents and thresholds are written with as many digits as float32, in which they are used, needs; shares with six
decimals, records with six digits: rounding changes nothing that a model computes.

Format 1 had plan.json alone, with the history in it; it is still read. Plans for planes are of format 3, all others of
2. docs/plan-format.md describes them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from kernels_pallas.formats import FORMATS
from wisparse_jax.errors import PlanError
from wisparse_jax.files import check_regular, new_folder, read_bytes, read_json
from wisparse_jax.models.basis import Basis
from wisparse_jax.models.config import LAYERS
from wisparse_jax.sparsity.plan import (
    HISTORY_FILE,
    PLAN_FILE,
    TENSORS_FILE,
    SparsityPlan,
    Vectors,
    check_basis,
    check_numbers,
)
from wisparse_jax.sparsity.planes import PlaneCurves

FORMAT, WITH_PLANES, READABLE = 2, 3, (1, 2, 3)
LARGEST_JSON = 16 << 20
_TABLES: tuple[str, ...] = ("exponents", "sparsities", "thresholds", "realised")
_WIDTH = 120  # characters of a line of JSON
_CURVES = ("levels", "thresholds", "costs")
_PLANE_GAIN = "plane_gain"
_VECTORS = {"gains": "gain", "biases": "bias"}  # field of a plan -> name of its tensors


@dataclasses.dataclass
class _Layer:
    exponent: float
    sparsity: float
    threshold: float
    realised: float | None = None


@dataclasses.dataclass
class _File:
    """What a plan.json holds, in any of its formats."""

    format: int
    method: str
    target: float
    fingerprint: str
    seed: int
    layer_weights: dict[str, int]
    blocks: list[dict[str, _Layer]]
    version: str
    calibration: dict[str, Any]
    settings: dict[str, Any]
    timings: dict[str, float]
    held_out: dict[str, Any] = dataclasses.field(default_factory=dict)
    history: dict[str, Any] = dataclasses.field(default_factory=dict)
    tensors: str | None = None  # sha256 of the file of tensors
    planes: str | None = None  # the weight format, of a plan for planes


def plan_files(plan: SparsityPlan) -> dict[str, bytes]:
    """The files of a plan's folder by name; see `SparsityPlan.save`."""
    from safetensors.numpy import save

    check_numbers(plan)
    files: dict[str, bytes] = {}
    digest = None
    if tensors := _tensors(plan):
        files[TENSORS_FILE] = save(tensors)
        digest = hashlib.sha256(files[TENSORS_FILE]).hexdigest()
    files[PLAN_FILE] = _text(_as_json(plan, digest)).encode()
    if plan.history:
        files[HISTORY_FILE] = _text(_short(plan.history)).encode()
    return files


def write_plan(plan: SparsityPlan, path: Path) -> None:
    """Write a plan as a new folder, whole or not at all; see `SparsityPlan.save`."""
    files = plan_files(plan)
    with new_folder(path, PlanError) as folder:
        for name, data in files.items():
            (folder / name).write_bytes(data)


def read_plan(path: Path) -> SparsityPlan:
    """Read a plan folder, or the plan.json of one; see `SparsityPlan.load`."""
    folder = path.parent if path.name == PLAN_FILE and os.path.isfile(path) else path
    file = folder / PLAN_FILE
    if not os.path.lexists(file):  # os.path's questions have an answer for a name of any length
        there = "no such folder"
        if os.path.exists(path):
            there = f"no {PLAN_FILE} in it" if path.is_dir() else "a file"
        raise PlanError(f"{path}: expected a plan folder, found {there}")
    head = read_json(file, dict[str, Any], PlanError, LARGEST_JSON)
    if "format" not in head:
        raise PlanError(f"{file}: format: missing; this is not a sparsity plan")
    if head["format"] not in READABLE:
        raise PlanError(
            f"{file}: format = {head['format']!r}: this version reads formats {', '.join(map(str, READABLE))}"
        )
    raw: _File = read_json(file, _File, PlanError, LARGEST_JSON)
    history = folder / HISTORY_FILE
    if os.path.lexists(history):
        raw.history = read_json(history, dict[str, Any], PlanError, LARGEST_JSON)
    try:
        plan = _parse(raw)
        check_numbers(plan)
    except PlanError as error:
        raise PlanError(f"{file}: {error}") from None
    if (raw.format == WITH_PLANES) != (raw.planes is not None) or (raw.planes is not None and raw.tensors is None):
        raise PlanError(
            f"{file}: planes: expected a weight format, and tensors, in plans of format {WITH_PLANES} alone"
        )
    if raw.tensors is None:
        return plan
    return _with_tensors(plan, folder / TENSORS_FILE, raw.tensors, raw.planes)


def _short(value: Any) -> Any:
    """A record with its numbers rounded, and null for what is none: a descent that diverged does not lose the plan."""
    if isinstance(value, dict):
        return {key: _short(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_short(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _text(value: Any) -> str:
    return "".join(_lines(value)) + "\n"


def _lines(value: Any, depth: int = 0) -> Iterator[str]:
    """JSON in which whatever fits into a line stands in one."""
    line = json.dumps(value, allow_nan=False)
    if len(line) + depth <= _WIDTH or not isinstance(value, dict | list):
        yield line
        return
    items = value.items() if isinstance(value, dict) else ((None, entry) for entry in value)
    for number, (key, entry) in enumerate(items):
        yield ("," if number else "{" if isinstance(value, dict) else "[") + "\n" + " " * (depth + 1)
        if key is not None:
            yield f"{json.dumps(key)}: "
        yield from _lines(entry, depth + 1)
    yield "\n" + " " * depth + ("}" if isinstance(value, dict) else "]")


def saved_numbers(plan: SparsityPlan) -> tuple[list[Any], dict[str, np.ndarray]]:
    """What is saved of a plan and decides what it does: the table by block and layer, and the tensors."""
    return _as_json(plan, None)["blocks"], _tensors(plan)


def _as_json(plan: SparsityPlan, digest: str | None) -> dict[str, Any]:
    tables = {name: getattr(plan, name) for name in _TABLES if getattr(plan, name) is not None}
    keys: dict[str, str] = dict(zip(_TABLES, ("exponent", "sparsity", "threshold", "realised"), strict=True))

    def entry(name: str, value: float) -> float:
        return round(float(value), 6) if name in ("sparsities", "realised") else float(str(np.float32(value)))

    blocks = [
        {
            layer: {keys[name]: entry(name, table[b, i]) for name, table in tables.items()}
            for i, layer in enumerate(LAYERS)
        }
        for b in range(len(plan.exponents))
    ]
    identity = {name: getattr(plan, name) for name in ("method", "target", "version", "fingerprint", "seed")}
    records = {name: _short(getattr(plan, name)) for name in ("held_out", "calibration", "timings")}
    weights = dict(zip(LAYERS, plan.layer_weights, strict=True))
    rest = {"settings": plan.settings, "tensors": digest, "layer_weights": weights, "blocks": blocks}
    if plan.planes is not None:
        return {"format": WITH_PLANES, **identity, **records, "planes": plan.planes.format, **rest}
    return {"format": FORMAT, **identity, **records, **rest}


def _parse(raw: _File) -> SparsityPlan:
    if not raw.blocks:
        raise PlanError("blocks: expected at least one, found none")
    for where, keys in [("layer_weights", raw.layer_weights)] + [(f"blocks[{b}]", k) for b, k in enumerate(raw.blocks)]:
        if set(keys) != set(LAYERS):
            raise PlanError(f"{where}: expected the layers {', '.join(LAYERS)}")

    def table(key: str) -> np.ndarray:
        return np.array([[getattr(block[name], key) for name in LAYERS] for block in raw.blocks], np.float64)

    realised = None if raw.format == 1 else table("realised")
    if realised is not None and not ((realised >= 0) & (realised <= 1)).all():
        raise PlanError("blocks: realised: expected numbers from 0 to 1 of every layer")
    return SparsityPlan(
        method=raw.method,
        target=raw.target,
        exponents=table("exponent"),
        sparsities=table("sparsity"),
        thresholds=table("threshold"),
        realised=realised,
        layer_weights=tuple(raw.layer_weights[name] for name in LAYERS),
        **{
            name: getattr(raw, name)
            for name in ("fingerprint", "seed", "calibration", "settings", "held_out", "timings", "history", "version")
        },
    )


def _tensors(plan: SparsityPlan) -> dict[str, np.ndarray]:
    """What of a plan goes into its file of tensors."""
    out: dict[str, Any] = {}
    if plan.basis is not None:
        out |= {f"basis.{name}": getattr(plan.basis, name) for name in Basis._fields}
    if plan.planes is not None:
        out |= {f"planes.{name}": getattr(plan.planes, name) for name in _CURVES}
        for b, block in enumerate(plan.planes.gains):
            out |= {f"blocks.{b}.{layer}.{_PLANE_GAIN}": block[layer] for layer in LAYERS}
    for field, name in _VECTORS.items():
        for b, block in enumerate(getattr(plan, field) or ()):
            out |= {f"blocks.{b}.{layer}.{name}": block[layer] for layer in LAYERS}
    return {name: np.ascontiguousarray(np.asarray(value, np.float32)) for name, value in out.items()}


def _with_tensors(plan: SparsityPlan, file: Path, digest: str, planes: str | None) -> SparsityPlan:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    check_regular(file, PlanError)
    data = read_bytes(file, PlanError, file.stat().st_size)
    if (found := hashlib.sha256(data).hexdigest()) != digest:
        raise PlanError(f"{file}: changed or damaged: expected sha256 {digest[:16]}, found {found[:16]}")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise PlanError(f"{file}: not readable as safetensors: {error}") from None
    for name, value in tensors.items():
        if value.dtype != np.float32 or not np.isfinite(value).all():
            raise PlanError(f"{file}: tensor {name}: expected finite float32 numbers")
        size = value.shape[-1] if value.ndim else 0
        expected = {"basis.stream": (size, size), "basis.heads": (len(plan.exponents), *value.shape[1:2], size, size)}
        # `check_curves` and the model tell the shapes of those for planes.
        for_planes = name.startswith("planes.") or name.endswith(f".{_PLANE_GAIN}")
        if not for_planes and value.shape != expected.get(name, (size,)):
            raise PlanError(f"{file}: tensor {name}: expected another shape, found {list(value.shape)}")
    parts: dict[str, Any] = {}
    names = {f"basis.{name}" for name in Basis._fields}
    if names <= set(tensors):
        parts["basis"] = Basis(*(jnp.asarray(tensors.pop(f"basis.{name}")) for name in Basis._fields))
        check_basis(parts["basis"], str(file))
    for field, kind in (_VECTORS | {"planes": _PLANE_GAIN}).items():
        vectors: list[Vectors] = []
        for b in range(len(plan.exponents)):
            keys = {layer: f"blocks.{b}.{layer}.{kind}" for layer in LAYERS}
            if set(keys.values()) <= set(tensors):
                vectors.append({layer: jnp.asarray(tensors.pop(key)) for layer, key in keys.items()})
        if vectors and len(vectors) != len(plan.exponents):
            raise PlanError(f"{file}: tensors blocks.*.{kind}: expected those of {len(plan.exponents)} blocks")
        parts[field] = vectors or None
    if planes is not None:
        parts["planes"] = _curves(file, planes, tensors, parts["planes"])
    if tensors:
        raise PlanError(f"{file}: tensor {sorted(tensors)[0]!r} is unexpected, or others that go with it are missing")
    whole = dataclasses.replace(plan, **parts)
    try:
        check_numbers(whole)
    except PlanError as error:
        raise PlanError(f"{file}: {error}") from None
    return whole


def _curves(file: Path, planes: str, tensors: dict[str, np.ndarray], gains: list[dict[str, Any]] | None) -> PlaneCurves:
    """The curves of a plan for planes, taken out of its tensors."""
    offered = [name for name, one in FORMATS.items() if len(one.plane_bits) > 1]
    if planes not in offered:
        raise PlanError(f"{file}: planes = {planes!r}: expected {' or '.join(offered)}")
    names = {name: f"planes.{name}" for name in _CURVES}
    if gains is None or not set(names.values()) <= set(tensors):
        raise PlanError(f"{file}: expected the tensors {', '.join(names.values())} and blocks.*.{_PLANE_GAIN}")
    arrays = {name: tensors.pop(key).astype(np.float64) for name, key in names.items()}
    return PlaneCurves(format=planes, gains=gains, **arrays)
