"""The one entry point of the operation; implementations stand behind its `implementation` keyword."""

from __future__ import annotations

from jaxtyping import Array, Float

from kernels_pallas.sparse_linear.reference import sparse_linear_reference


def sparse_linear(
    x: Float[Array, "*batch in_channels"],
    weight: Float[Array, "in_channels out"],
    thresholds: Float[Array, " in_channels"],
    implementation: str | None = None,
) -> Float[Array, "*batch out"]:
    """Multiply the kept channels of x with the weight: `y = (m * x) @ W`, `m_i = |x_i| >= t_i`.

    The thresholds carry the whole scoring rule: `t_i = tau / max(||W_i||^alpha, 1e-4)` keeps exactly the channels
    whose score `|x_i| * max(||W_i||^alpha, 1e-4)` reaches tau (WiSparse, arXiv 2602.14452, section 3).

    Args:
        x: activations, bf16, f16 or f32.
        weight: `[in, out]` in the dtype of x.
        thresholds: float32, one per input channel, not negative; 0 keeps all, +inf keeps only infinities.
        implementation: "xla", the masked-dense form; None picks the best for the device.

    Raises:
        ValueError: an implementation that does not exist.
    """
    if implementation not in (None, "xla"):
        raise ValueError(f"implementation = {implementation!r}: expected None or 'xla'")
    return sparse_linear_reference(x, weight, thresholds)
