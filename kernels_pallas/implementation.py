"""Which implementation of an operation runs: the one that was named, or the best that the device can run."""

from __future__ import annotations

from typing import Any

import jax

IMPLEMENTATIONS = ("triton", "xla")


def choose(implementation: str | None, interpret: bool = False, offered: tuple[str, ...] = IMPLEMENTATIONS) -> str:
    """The implementation that a call uses; None is the kernel that the device can run, or plain XLA.

    Args:
        implementation: one of `offered`, or None.
        interpret: kernels are interpreted, which every device can do, slowly.
        offered: what the operation has, at most one of "triton" and "mosaic" to be chosen by None, the first.

    Raises:
        ValueError: a name that does not exist, or that this device cannot run.
    """
    if implementation is None and "triton" in offered:
        return "triton" if interpret or jax.default_backend() == "gpu" else "xla"
    if implementation is None:
        return "mosaic" if interpret or mosaic_problem() is None else "xla"
    if implementation not in offered:
        raise ValueError(f"implementation = {implementation!r}: expected None or one of {', '.join(offered)}")
    if implementation == "triton" and not interpret and not _lowers_for_cuda():
        raise ValueError(
            f"implementation = 'triton' needs an NVIDIA GPU; the default device is {jax.default_backend()!r}"
        )
    problem = mosaic_problem() if implementation == "mosaic" and not interpret else None
    if problem is not None:
        raise ValueError(f"implementation = 'mosaic' {problem}")
    return implementation


def mosaic_problem() -> str | None:
    """Why the Mosaic kernels cannot run here, if they cannot."""
    if not _lowers_for_cuda():
        return f"needs an NVIDIA GPU; the default device is {jax.default_backend()!r}"
    capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
    if not capability.startswith("9."):
        return f"needs an NVIDIA GPU of compute capability 9; the default device has {capability}"
    try:
        import kernels_pallas.lanes.mosaic  # noqa: F401
    except ImportError as error:
        return f"needs jax 0.11 or newer, found {jax.__version__}: {error}"
    return None


def processors() -> int:
    """Multiprocessors of the GPU, there or pretended; on a machine without one those of an H200."""
    if jax.default_backend() == "gpu":
        return jax.devices()[0].core_count
    device = _pretended()
    return 132 if device is None else device.num_cores


def _lowers_for_cuda() -> bool:
    """A GPU is there, or a pretended one is being lowered for (an abstract mesh of GPUs)."""
    if jax.default_backend() == "gpu":
        return True
    device = _pretended()
    return device is not None and device.platform == "gpu"


def _pretended() -> Any:
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
