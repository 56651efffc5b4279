"""Lowering for an NVIDIA GPU where there is none: catches what interpret mode forgives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import export

TRITON_CALL, MOSAIC_CALL = "__gpu$xla.gpu.triton", "mosaic_gpu_v2"


def lower_for_gpu(function: Callable[..., Any], *arguments: Any, device_kind: str = "NVIDIA H200") -> str:
    """The StableHLO of the function, lowered for CUDA with a pretended GPU.

    Args:
        function: to be compiled.
        arguments: arrays or `jax.ShapeDtypeStruct`s.
        device_kind: of the pretended GPU.
    """
    device = jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=device)
    allowed = [export.DisabledSafetyCheck.custom_call(call) for call in (TRITON_CALL, MOSAIC_CALL)]
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = export.export(jax.jit(function), platforms=["cuda"], disabled_checks=allowed)(*arguments)
    return lowered.mlir_module()
