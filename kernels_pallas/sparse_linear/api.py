"""The one entry point of the operation; implementations stand behind its `implementation` keyword."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.implementation import choose
from kernels_pallas.kept import LARGEST_BATCH, Nested
from kernels_pallas.select import select
from kernels_pallas.sparse_linear.reference import sparse_linear_reference
from kernels_pallas.sparse_product import config_for, sparse_product
from kernels_pallas.weight import Weight, as_weight


def sparse_linear(
    x: Float[Array, "*batch in_channels"],
    weight: Weight | Array,
    thresholds: Float[Array, "*planes in_channels"],
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "*batch out"]:
    """Multiply the kept channels of x with the weight: `y = (m * x) @ W`, `m_i = |x_i| >= t_i`.

    The thresholds carry the whole scoring rule: `t_i = tau / max(||W_i||^alpha, 1e-4)` keeps exactly the channels
    whose score `|x_i| * max(||W_i||^alpha, 1e-4)` reaches tau (WiSparse, arXiv 2602.14452, section 3).

    Args:
        x: activations, bf16, f16 or f32.
        weight: `[in, out]` in the dtype of x, or in a format with scales.
        thresholds: float32, one per input channel, not negative; 0 keeps all, +inf keeps only infinities. Or `[planes,
            in]` for a weight of nested planes, of which plane k of channel i is read if `|x_i| >= t_ki`; ascending
            along the planes, as no plane is worth anything without those above it.
        implementation: "xla", the masked-dense form; "triton", kernels that read only the rows of kept channels; None
            is the kernels on an NVIDIA GPU for up to 16 rows, and the masked-dense form otherwise.
        interpret: interpret the kernels, on any device.

    Raises:
        ValueError: an implementation that does not exist or cannot run here, too many rows for the kernels, or
            thresholds of other planes than the weight has.
    """
    rows, weight = math.prod(x.shape[:-1]), as_weight(weight)
    planes = len(weight.format.planes)
    if thresholds.ndim > 1 and thresholds.shape[:-1] != (planes,):
        raise ValueError(f"thresholds: expected [{planes}, in] for {weight.kind} weights, found {thresholds.shape}")
    chosen = choose(implementation, interpret)
    if chosen == "triton" and rows > LARGEST_BATCH:
        if implementation is not None:
            raise ValueError(f"implementation = 'triton' takes at most {LARGEST_BATCH} rows, found {rows}")
        chosen = "xla"
    if chosen == "xla":
        return sparse_linear_reference(x, weight, thresholds)
    flat = x.reshape(rows, x.shape[-1])
    lists = jnp.broadcast_to(thresholds, (planes, x.shape[-1])) if thresholds.ndim == 1 else thresholds
    config = config_for(weight.shape[0], (weight.shape[1],), rows, weight.kind)
    kept = select(flat, lists, config.rows, "triton", interpret, nested=Nested(planes, weight.format.alone))
    (parts,) = sparse_product(kept, [weight], config=config, implementation="triton", interpret=interpret)
    return parts.sum(0).astype(x.dtype).reshape(*x.shape[:-1], -1)
