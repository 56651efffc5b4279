"""The entry points: one selection after each of the four computations that feed block linears.

All of them keep channel i of layer l when `|x_i| >= thresholds[l, i]` in any of the sequences, and list the kept
channels chunk by chunk (`Kept`); a sequence's own skipped channels are listed with value 0.
With `factors` a sequence's thresholds are those times its factor, which the kernels multiply as they compare.
`nested` says of weights in planes how their lists follow each other, see `kept.Nested`.
"""

from __future__ import annotations

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels_pallas.implementation import choose
from kernels_pallas.kept import WHOLE, Kept, Nested
from kernels_pallas.select import reference


def select(
    x: Float[Array, "batch in_channels"],
    thresholds: Float[Array, "layers in_channels"],
    rows: int,
    implementation: str | None = None,
    interpret: bool = False,
    factors: Float[Array, " batch"] | None = None,
    nested: Nested = WHOLE,
) -> Kept:
    """The kept channels of a vector per sequence, in chunks of `rows`, a power of two.

    Raises:
        ValueError: an implementation that cannot run here.
    """
    if choose(implementation, interpret) == "xla":
        return reference.select_reference(x, thresholds, rows, factors, nested)
    from kernels_pallas.select import triton

    return triton.select_plain(x, thresholds, rows, interpret, factors, nested)


def select_norm(
    x: Float[Array, "batch features"],
    parts: Float[Array, "parts batch features"] | None,
    bias: Float[Array, " features"] | None,
    weight: Float[Array, " features"],
    eps: float,
    thresholds: Float[Array, "layers features"],
    rows: int,
    implementation: str | None = None,
    interpret: bool = False,
    factors: Float[Array, " batch"] | None = None,
    nested: Nested = WHOLE,
) -> tuple[Float[Array, "batch features"], Kept]:
    """Add a product to the residual stream, RMS-normalise, and select.

    Args:
        x: the residual stream.
        parts: partial sums of the product that is added first, or None.
        bias: of that product, or None.
        weight: of the norm.
        eps: of the norm.
        thresholds: of the layers that read the normed stream.
        rows: channels in a chunk, a power of two.
        implementation: "triton", "xla" or None.
        interpret: interpret the kernel, on any device.
        factors: of each sequence's thresholds, or None.

    Returns:
        The new residual stream, and the kept channels of the normed one.

    Raises:
        ValueError: an implementation that cannot run here.
    """
    if choose(implementation, interpret) == "xla":
        x = reference.add_parts(x, parts, bias)
        return x, reference.select_reference(reference.rms_norm(x, weight, eps), thresholds, rows, factors, nested)
    from kernels_pallas.select import triton

    return triton.select_norm(x, parts, bias, weight, eps, thresholds, rows, interpret, factors, nested)


def select_attention(
    partial: Float[Array, "batch splits features"],
    highest: Float[Array, "batch splits heads"],
    total: Float[Array, "batch splits heads"],
    thresholds: Float[Array, "layers features"],
    rows: int,
    dtype: DTypeLike,
    implementation: str | None = None,
    interpret: bool = False,
    factors: Float[Array, " batch"] | None = None,
    nested: Nested = WHOLE,
) -> Kept:
    """Merge the splits of `decode_attention`, round to `dtype`, and select.

    Raises:
        ValueError: an implementation that cannot run here.
    """
    if choose(implementation, interpret) == "xla":
        merged = reference.merge_reference(partial, highest, total, dtype)
        return reference.select_reference(merged, thresholds, rows, factors, nested)
    from kernels_pallas.select import triton

    return triton.select_attention(partial, highest, total, thresholds, rows, dtype, interpret, factors, nested)


def select_gated(
    gate: Float[Array, "parts batch features"],
    up: Float[Array, "parts batch features"],
    gate_bias: Float[Array, " features"] | None,
    up_bias: Float[Array, " features"] | None,
    thresholds: Float[Array, "layers features"],
    rows: int,
    dtype: DTypeLike,
    implementation: str | None = None,
    interpret: bool = False,
    factors: Float[Array, " batch"] | None = None,
    nested: Nested = WHOLE,
) -> Kept:
    """`silu(gate) * up` from partial sums, in `dtype`, and select.

    Raises:
        ValueError: an implementation that cannot run here.
    """
    if choose(implementation, interpret) == "xla":
        hidden = reference.gated_reference(gate, up, gate_bias, up_bias, dtype)
        return reference.select_reference(hidden, thresholds, rows, factors, nested)
    from kernels_pallas.select import triton

    return triton.select_gated(gate, up, gate_bias, up_bias, thresholds, rows, dtype, interpret, factors, nested)
