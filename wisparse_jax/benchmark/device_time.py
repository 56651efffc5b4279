"""Kernel times of a GPU, from the profiler's own events."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

# Bytes per second that the vendor states, by `jax.Device.device_kind`.
PEAK_BANDWIDTH = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA A100-SXM4-80GB": 2.04e12}


def measure(run: Callable[[], Any]) -> dict[str, list[float]]:
    """The seconds of each launch, by the name of its kernel, of something that has run before.

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
                        events += [(e.duration_ns, e.name) for e in line.events]
    if not events:
        raise RuntimeError("the profiler recorded no GPU kernels")
    kernels: dict[str, list[float]] = defaultdict(list)
    for duration, name in events:
        kernels[name].append(duration * 1e-9)
    return dict(kernels)
