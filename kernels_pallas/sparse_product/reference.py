"""The product of listed channels in plain XLA."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.kept import Kept


def sparse_product_reference(
    kept: Kept, weights: Sequence[Array], scales: Sequence[Array | None]
) -> tuple[Float[Array, "1 batch _"], ...]:
    """Every layer's list spread out to a vector again and multiplied densely in float32."""
    out = []
    for layer, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        real = jnp.arange(kept.rows) < kept.counts[layer][:, None]
        channels = jnp.where(real, kept.channels[layer], weight.shape[0]).reshape(-1)
        values = jnp.where(real[:, None], kept.values[layer], 0).astype(jnp.float32)
        batch = values.shape[1]
        spread = jnp.zeros((batch, weight.shape[0]), jnp.float32)
        spread = spread.at[:, channels].add(values.swapaxes(0, 1).reshape(batch, -1), mode="drop")
        product = jnp.matmul(spread, weight.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        out.append((product if scale is None else product * scale)[None])
    return tuple(out)
