"""The masked-dense form in plain XLA: ground truth for every kernel, and the path on CPU and TPU."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from kernels_pallas.weight import Weight, as_weight


def keep_mask(
    x: Float[Array, "*batch in_channels"], thresholds: Float[Array, " in_channels"]
) -> Bool[Array, "*batch in_channels"]:
    """`|x_i| >= t_i`, compared in float32; a NaN is not kept."""
    return jnp.abs(x.astype(jnp.float32)) >= lax.broadcast_to_rank(thresholds.astype(jnp.float32), x.ndim)


def dot(x: Float[Array, "*batch in_channels"], weight: Weight | Array) -> Float[Array, "*batch out"]:
    """`x @ weight` in x's dtype; of an int8 weight the columns' scales come after the product.

    float32 is computed as float32 on every device (no TF32, no bf16 passes).
    """
    weight = as_weight(weight)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    if weight.scales is None:
        return jnp.matmul(x, weight.values, precision=precision)
    if weight.kind == "int4":
        return jnp.matmul(x, weight.wide(x.dtype), precision=precision)
    whole = jnp.matmul(x, weight.values.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
    return (whole * lax.broadcast_to_rank(weight.scales, whole.ndim)).astype(x.dtype)


def sparse_linear_reference(
    x: Float[Array, "*batch in_channels"],
    weight: Weight | Array,
    thresholds: Float[Array, " in_channels"],
) -> Float[Array, "*batch out"]:
    """`(m * x) @ W` with `m_i = |x_i| >= t_i`."""
    return dot(jnp.where(keep_mask(x, thresholds), x, jnp.zeros_like(x)), weight)
