"""Which implementation of an operation runs: the one that was named, or the best that the device can run."""

from __future__ import annotations

import jax

IMPLEMENTATIONS = ("triton", "xla")


def choose(implementation: str | None, interpret: bool = False) -> str:
    """The implementation that a call uses; None is Triton on an NVIDIA GPU and plain XLA elsewhere.

    Args:
        implementation: "triton", "xla" or None.
        interpret: Triton kernels are interpreted, which every device can do, slowly.

    Raises:
        ValueError: a name that does not exist, or that this device cannot run.
    """
    if implementation is None:
        return "triton" if interpret or jax.default_backend() == "gpu" else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation = {implementation!r}: expected None or one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "triton" and not interpret and not _lowers_for_cuda():
        raise ValueError(
            f"implementation = 'triton' needs an NVIDIA GPU; the default device is {jax.default_backend()!r}"
        )
    return implementation


def _lowers_for_cuda() -> bool:
    """A GPU is there, or a pretended one is being lowered for (an abstract mesh of GPUs)."""
    if jax.default_backend() == "gpu":
        return True
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device is not None and device.platform == "gpu"
