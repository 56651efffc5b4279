"""Tuned values, a JSON file per device: for each kind of kernel what `scripts/tune_kernels.py` found fastest."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

import jax


def tuned(device: str | None, kind: str) -> dict[str, Any]:
    """The values for one kind of kernel by shape; none for a device that was never tuned.

    Args:
        device: `jax.Device.device_kind`; None is the default device.
        kind: "triton", the sparse product; "mosaic", the fused block.
    """
    return _read(jax.devices()[0].device_kind if device is None else device).get(kind, {})


@functools.cache
def _read(device: str) -> dict[str, Any]:
    file = resources.files("kernels_pallas") / "tuned" / tuned_file(device)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def tuned_file(device: str) -> str:
    """The name of a device's file of tuned values."""
    return device.lower().replace(" ", "-") + ".json"
