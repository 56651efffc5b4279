"""Which implementation of an operation runs: the one that was named, or the best that the device can run."""

from __future__ import annotations

import jax

IMPLEMENTATIONS = ("triton", "xla")


def choose(implementation: str | None, interpret: bool = False, offered: tuple[str, ...] = IMPLEMENTATIONS) -> str:
    """The implementation that a call uses; None is Triton on an NVIDIA GPU and plain XLA elsewhere.

    Args:
        implementation: one of `offered`, or None.
        interpret: Triton kernels are interpreted, which every device can do, slowly.
        offered: what the operation has.

    Raises:
        ValueError: a name that does not exist, or that this device cannot run.
    """
    if implementation is None:
        return "triton" if interpret or jax.default_backend() == "gpu" else "xla"
    if implementation not in offered:
        raise ValueError(f"implementation = {implementation!r}: expected None or one of {', '.join(offered)}")
    if implementation == "triton" and not interpret and not _lowers_for_cuda():
        raise ValueError(
            f"implementation = 'triton' needs an NVIDIA GPU; the default device is {jax.default_backend()!r}"
        )
    problem = mosaic_problem() if implementation == "mosaic" else None
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
        import kernels_pallas.sparse_product.mosaic  # noqa: F401
    except ImportError as error:
        return f"needs jax 0.11 or newer, found {jax.__version__}: {error}"
    return None


def _lowers_for_cuda() -> bool:
    """A GPU is there, or a pretended one is being lowered for (an abstract mesh of GPUs)."""
    if jax.default_backend() == "gpu":
        return True
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device is not None and device.platform == "gpu"
