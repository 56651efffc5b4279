"""Decode attention in plain XLA, as one split."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.select.reference import rms_norm


def rotate(
    x: Float[Array, "*batch heads head_dim"], cos: Float[Array, "*batch half"], sin: Float[Array, "*batch half"]
) -> Float[Array, "*batch heads head_dim"]:
    """Rotate the pairs `(x_i, x_{i + head_dim/2})`, in float32, back in the dtype of x."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    c, s = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * c - b * s, b * c + a * s], axis=-1).astype(x.dtype)


def decode_attention_reference(
    products: Any,
    biases: Any,
    norms: Any,
    cos: Array,
    sin: Array,
    keys: Array,
    values: Array,
    slot: Array,
    start: Array,
    window: int | None,
    norm_eps: float,
) -> tuple[Array, Array, Array, Array, Array]:
    """See `decode_attention`."""
    batch, slots, kv_heads, head_dim = keys.shape
    dtype = keys.dtype

    def finish(which: int) -> Array:
        y = products[which].sum(0).astype(dtype)
        y = y if biases[which] is None else y + biases[which][None]
        return y.reshape(batch, -1, head_dim)

    query, key, value = finish(0), finish(1), finish(2)
    if norms is not None:
        query, key = rms_norm(query, norms.query, norm_eps), rms_norm(key, norms.key, norm_eps)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    keys = lax.dynamic_update_slice(keys, key[:, None], (0, slot, 0, 0))
    values = lax.dynamic_update_slice(values, value[:, None], (0, slot, 0, 0))

    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    grouped = query.reshape(batch, kv_heads, -1, head_dim)
    scores = jnp.einsum("bkgd,bskd->bkgs", grouped, keys, precision=precision, preferred_element_type=jnp.float32)
    at = jnp.arange(slots)[None]
    seen = (at >= start[:, None]) & (at <= slot)
    if window is not None:
        seen &= at > slot - window
    scores = jnp.where(seen[:, None, None], scores * head_dim**-0.5, -1e30)
    highest = scores.max(-1)
    weights = jnp.exp(scores - highest[..., None])
    out = jnp.einsum("bkgs,bskd->bkgd", weights, values.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    flat = (batch, 1, -1)
    return out.reshape(flat), highest.reshape(flat), weights.sum(-1).reshape(flat), keys, values
