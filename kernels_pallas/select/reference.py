"""Selection, and the computations before it, in plain XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels_pallas.formats.base import scaled
from kernels_pallas.kept import WHOLE, Kept, Nested


def select_reference(
    x: Float[Array, "batch in_channels"],
    thresholds: Float[Array, "layers in_channels"],
    rows: int,
    factors: Float[Array, " batch"] | None = None,
    nested: Nested = WHOLE,
) -> Kept:
    """`|x_i| >= t_i` of any sequence, kept channels first in each chunk, in their order."""
    own = thresholds[:, None] if factors is None else thresholds[:, None] * factors[None, :, None]
    batch, size = x.shape
    chunks = -(-size // rows)
    padding = ((0, 0), (0, chunks * rows - size))
    values = jnp.pad(x, padding)
    # Channels that pad the last chunk are below any threshold.
    padded = jnp.pad(own, ((0, 0), *padding), constant_values=jnp.inf)
    keeps = jnp.abs(values.astype(jnp.float32))[None] >= padded
    shape = (len(thresholds), batch, chunks, rows)
    keeps = keeps.reshape(shape)
    kept = keeps.any(axis=1)
    order = jnp.argsort(~kept, axis=-1, stable=True)
    each = jnp.broadcast_to(values.reshape(batch, chunks, rows), shape)
    if nested.alone != 1:
        first = (jnp.arange(len(keeps)) % nested.planes == 0)[:, None, None, None]
        each = jnp.where(first & ~jnp.roll(keeps, -1, axis=0), scaled(each, nested.alone), each)
    kept_values = jnp.where(keeps, each, 0).swapaxes(1, 2)
    listed = jnp.take_along_axis(kept_values, order[:, :, None], axis=-1)
    channels = order + jnp.arange(chunks)[None, :, None] * rows
    return Kept(kept.sum(-1, dtype=jnp.int32), channels.astype(jnp.int32), listed.astype(x.dtype))


def add_parts(
    x: Float[Array, "batch features"],
    parts: Float[Array, "parts batch features"] | None,
    bias: Float[Array, " features"] | None,
) -> Float[Array, "batch features"]:
    """The residual stream with a product's partial sums, rounded as the product and the bias are elsewhere."""
    if parts is None:
        return x
    y = parts.sum(0).astype(x.dtype)
    return x + (y if bias is None else y + bias[None])


def rms_norm(
    x: Float[Array, "*batch features"], weight: Float[Array, " features"], eps: float
) -> Float[Array, "*batch features"]:
    """`x / rms(x) * weight`, the mean square in float32."""
    f = x.astype(jnp.float32)
    f = f * lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + eps)
    return lax.broadcast_to_rank(weight, x.ndim) * f.astype(x.dtype)


def gated_reference(
    gate: Float[Array, "parts batch features"],
    up: Float[Array, "parts batch features"],
    gate_bias: Float[Array, " features"] | None,
    up_bias: Float[Array, " features"] | None,
    dtype: DTypeLike,
) -> Float[Array, "batch features"]:
    """`silu(gate) * up`, from partial sums that are rounded as elsewhere; in float32, rounded once."""
    g, u = gate.sum(0).astype(dtype), up.sum(0).astype(dtype)
    g, u = (g if gate_bias is None else g + gate_bias[None]), (u if up_bias is None else u + up_bias[None])
    return (jax.nn.silu(g.astype(jnp.float32)) * u.astype(jnp.float32)).astype(dtype)


def merge_reference(
    partial: Float[Array, "batch splits features"],
    highest: Float[Array, "batch splits heads"],
    total: Float[Array, "batch splits heads"],
    dtype: DTypeLike,
) -> Float[Array, "batch features"]:
    """Attention over all slots, from unnormalised attention over splits of them."""
    share = jnp.exp(highest - highest.max(axis=1, keepdims=True))
    heads = partial.reshape(*highest.shape, -1)
    out = (heads * share[..., None]).sum(1) / (total * share).sum(1)[..., None]
    return out.reshape(len(out), -1).astype(dtype)
