"""The masked-dense form in plain XLA: ground truth for every kernel, and the path on CPU and TPU."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Num


def keep_mask(
    x: Float[Array, "*batch in_channels"], thresholds: Float[Array, " in_channels"]
) -> Bool[Array, "*batch in_channels"]:
    """`|x_i| >= t_i`, compared in float32; a NaN is not kept."""
    return jnp.abs(x.astype(jnp.float32)) >= thresholds.astype(jnp.float32)


def dot(
    x: Float[Array, "*batch in_channels"],
    weight: Num[Array, "in_channels out"],
    scale: Float[Array, " out"] | None = None,
) -> Float[Array, "*batch out"]:
    """`x @ weight`, times the scale of an int8 weight's columns, in x's dtype.

    float32 is computed as float32 on every device (no TF32, no bf16 passes).
    """
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    if scale is None:
        return jnp.matmul(x, weight, precision=precision)
    whole = jnp.matmul(x, weight.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
    return (whole * scale).astype(x.dtype)


def sparse_linear_reference(
    x: Float[Array, "*batch in_channels"],
    weight: Num[Array, "in_channels out"],
    thresholds: Float[Array, " in_channels"],
    scale: Float[Array, " out"] | None = None,
) -> Float[Array, "*batch out"]:
    """`(m * x) @ W` with `m_i = |x_i| >= t_i`."""
    return dot(jnp.where(keep_mask(x, thresholds), x, jnp.zeros_like(x)), weight, scale)
