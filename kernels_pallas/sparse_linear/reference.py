"""The masked-dense form in plain XLA: ground truth for every kernel, and the path on CPU and TPU."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from kernels_pallas.formats.base import precision_of, scaled
from kernels_pallas.weight import Weight, as_weight


def keep_mask(
    x: Float[Array, "*batch in_channels"], thresholds: Float[Array, "*planes in_channels"]
) -> Bool[Array, "*batch_and_planes in_channels"]:
    """`|x_i| >= t_i`, compared in float32; a NaN is not kept. With thresholds for each plane one mask for each."""
    size = jnp.abs(x.astype(jnp.float32))
    size = size if thresholds.ndim == 1 else size[..., None, :]
    return size >= lax.broadcast_to_rank(thresholds.astype(jnp.float32), size.ndim)


def read_share(
    x: Float[Array, "*batch in_channels"], weight: Weight | Array, thresholds: Float[Array, "*planes in_channels"]
) -> Float[Array, "*batch"]:
    """The share of the weight's bits that each row of x reads, scales counted; without planes of the kept channels."""
    kept = jnp.mean(keep_mask(x, thresholds).astype(jnp.float32), axis=-1)
    if thresholds.ndim == 1:
        return kept
    bits = jnp.asarray(as_weight(weight).format.plane_bits, jnp.float32)
    return kept @ (bits / bits.sum())


def dot(x: Float[Array, "*batch in_channels"], weight: Weight | Array) -> Float[Array, "*batch out"]:
    """`x @ weight` in x's dtype; float32 is computed as float32 on every device (no TF32, no bf16 passes)."""
    weight = as_weight(weight)
    return weight.format.dot(x, *weight)


def sparse_linear_reference(
    x: Float[Array, "*batch in_channels"],
    weight: Weight | Array,
    thresholds: Float[Array, "*planes in_channels"],
) -> Float[Array, "*batch out"]:
    """`(m * x) @ W` with `m_i = |x_i| >= t_i`; with thresholds for each plane of what is read of W."""
    keep = keep_mask(x, thresholds)
    if thresholds.ndim == 1:
        return dot(jnp.where(keep, x, jnp.zeros_like(x)), weight)
    weight = as_weight(weight)
    planes, parts, wide = weight.wide_planes(), [], None
    for k, plane in enumerate(planes):
        wide = plane if wide is None else wide + plane
        # Channels that are read to this plane and no further.
        own = keep[..., k, :] if k + 1 == len(planes) else keep[..., k, :] & ~keep[..., k + 1, :]
        masked = jnp.where(own, x if k else scaled(x, weight.format.alone), jnp.zeros_like(x))
        how = {"precision": precision_of(x), "preferred_element_type": jnp.float32}
        parts.append(jnp.matmul(masked, wide.astype(x.dtype), **how))
    return sum(parts[1:], parts[0]).astype(x.dtype)
