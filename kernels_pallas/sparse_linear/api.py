"""The one entry point of the operation; implementations stand behind its `implementation` keyword."""

from __future__ import annotations

import math

from jaxtyping import Array, Float

from kernels_pallas.implementation import choose
from kernels_pallas.kept import LARGEST_BATCH
from kernels_pallas.select import select
from kernels_pallas.sparse_linear.reference import sparse_linear_reference
from kernels_pallas.sparse_product import config_for, sparse_product
from kernels_pallas.weight import Weight, as_weight


def sparse_linear(
    x: Float[Array, "*batch in_channels"],
    weight: Weight | Array,
    thresholds: Float[Array, " in_channels"],
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "*batch out"]:
    """Multiply the kept channels of x with the weight: `y = (m * x) @ W`, `m_i = |x_i| >= t_i`.

    The thresholds carry the whole scoring rule: `t_i = tau / max(||W_i||^alpha, 1e-4)` keeps exactly the channels
    whose score `|x_i| * max(||W_i||^alpha, 1e-4)` reaches tau (WiSparse, arXiv 2602.14452, section 3).

    Args:
        x: activations, bf16, f16 or f32.
        weight: `[in, out]` in the dtype of x, or int8 or int4 with scales.
        thresholds: float32, one per input channel, not negative; 0 keeps all, +inf keeps only infinities.
        implementation: "xla", the masked-dense form; "triton", kernels that read only the rows of kept channels; None
            is the kernels on an NVIDIA GPU for up to 16 rows, and the masked-dense form otherwise.
        interpret: interpret the kernels, on any device.

    Raises:
        ValueError: an implementation that does not exist or cannot run here, or too many rows for the kernels.
    """
    rows, weight = math.prod(x.shape[:-1]), as_weight(weight)
    chosen = choose(implementation, interpret)
    if chosen == "triton" and rows > LARGEST_BATCH:
        if implementation is not None:
            raise ValueError(f"implementation = 'triton' takes at most {LARGEST_BATCH} rows, found {rows}")
        chosen = "xla"
    if chosen == "xla":
        return sparse_linear_reference(x, weight, thresholds)
    flat = x.reshape(rows, x.shape[-1])
    config = config_for(weight.shape[0], (weight.shape[1],), rows, weight.kind)
    kept = select(flat, thresholds[None], config.rows, "triton", interpret)
    (parts,) = sparse_product(kept, [weight], config=config, implementation="triton", interpret=interpret)
    return parts.sum(0).astype(x.dtype).reshape(*x.shape[:-1], -1)
