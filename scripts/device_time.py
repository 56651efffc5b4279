"""Kernel times of a GPU, from the profiler's own events."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

# Bytes per second that the vendor states, by `jax.Device.device_kind`.
PEAK_BANDWIDTH = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA A100-SXM4-80GB": 2.04e12}


@dataclasses.dataclass
class DeviceTime:
    """Where the device's time went while something ran."""

    span: float  # seconds from the first kernel's start to the last one's end
    busy: float  # seconds in kernels
    kernels: dict[str, list[float]]  # seconds of each launch, by kernel name


def measure(run: Callable[[], Any]) -> DeviceTime:
    """Run something that has run before, with the profiler on.

    Raises:
        RuntimeError: the profiler saw no GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        events = []
        for plane in ProfileData.from_file(str(file)).planes:
            if plane.name.startswith("/device:GPU"):
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        events += [(e.start_ns, e.duration_ns, e.name) for e in line.events]
    if not events:
        raise RuntimeError("the profiler recorded no GPU kernels")
    kernels: dict[str, list[float]] = defaultdict(list)
    for _, duration, name in events:
        kernels[name].append(duration * 1e-9)
    span = max(start + duration for start, duration, _ in events) - min(start for start, _, _ in events)
    return DeviceTime(span * 1e-9, sum(duration for _, duration, _ in events) * 1e-9, dict(kernels))
