"""What was measured by device: a JSON file per device of what `scripts/tune_kernels.py` found fastest for each kind of
kernel, and one of the largest batches that are worth their sparse steps.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

import jax

LARGEST_BATCH = "largest-batch.json"


def tuned(device: str | None, kind: str) -> dict[str, Any]:
    """The values for one kind of kernel by shape; none for a device that was never tuned.

    Args:
        device: `jax.Device.device_kind`; None is the default device.
        kind: "triton", the sparse product; "mosaic", the fused block.
    """
    return _read(tuned_file(_kind(device))).get(kind, {})


def _kind(device: str | None) -> str:
    return jax.devices()[0].device_kind if device is None else device


@functools.cache
def _read(name: str) -> dict[str, Any]:
    file = resources.files("kernels_pallas") / "tuned" / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def largest_batch(implementation: str, device: str | None = None) -> int:
    """The most sequences for which the sparse step was measured to be faster than the dense one; 1 where nothing was.

    Of Llama-3.1-8B shapes in bfloat16 at 50 %, every sequence with a mask of its own (docs/benchmarks/h100.md and
    h200.md): what has to be read is the union of what the sequences keep.

    Args:
        implementation: of the step, "triton" or "mosaic".
        device: `jax.Device.device_kind`; None is the default device.
    """
    return _read(LARGEST_BATCH).get(_kind(device), {}).get(implementation, 1)


def tuned_file(device: str) -> str:
    """The name of a device's file of tuned values."""
    return device.lower().replace(" ", "-") + ".json"
