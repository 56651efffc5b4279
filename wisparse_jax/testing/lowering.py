"""Lowering for an NVIDIA GPU where there is none: catches what interpret mode forgives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import export

TRITON_CALL, MOSAIC_CALL = "__gpu$xla.gpu.triton", "mosaic_gpu_v2"


def lower_for_gpu(
    function: Callable[..., Any],
    *arguments: Any,
    device_kind: str = "NVIDIA H200",
    axes: Mapping[str, int] | None = None,
) -> str:
    """The StableHLO of the function, lowered for CUDA with a pretended GPU.

    Args:
        function: to be compiled.
        arguments: arrays or `jax.ShapeDtypeStruct`s.
        device_kind: of the pretended GPU.
        axes: sizes of the axes of a mesh of them, which the function finds by `jax.sharding.get_abstract_mesh`; None is
            one GPU.
    """
    device = jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=132, platform="gpu")
    sizes = {"device": 1} if axes is None else axes
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, abstract_device=device)
    allowed = [export.DisabledSafetyCheck.custom_call(call) for call in (TRITON_CALL, MOSAIC_CALL)]
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = export.export(jax.jit(function), platforms=["cuda"], disabled_checks=allowed)(*arguments)
    return lowered.mlir_module()
