"""The product of listed channels in plain XLA."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.kept import Kept
from kernels_pallas.weight import Weight


def sparse_product_reference(kept: Kept, weights: Sequence[Weight]) -> tuple[Float[Array, "1 batch _"], ...]:
    """Every layer's list spread out to a vector again and multiplied densely in float32."""
    out, layer = [], 0
    for weight in weights:
        planes = weight.wide_planes()
        total = sum(_product(kept, layer + k, plane) for k, plane in enumerate(planes))
        out.append(jnp.asarray(total)[None])
        layer += len(planes)
    return tuple(out)


def _product(kept: Kept, layer: int, wide: Float[Array, "in_channels out"]) -> Float[Array, "batch out"]:
    real = jnp.arange(kept.rows)[None] < kept.counts[layer][:, None]
    channels = jnp.where(real, kept.channels[layer], len(wide)).reshape(-1)
    values = jnp.where(real[:, None], kept.values[layer], 0).astype(jnp.float32)
    batch = values.shape[1]
    spread = jnp.zeros((batch, len(wide)), jnp.float32)
    spread = spread.at[:, channels].add(values.swapaxes(0, 1).reshape(batch, -1), mode="drop")
    return jnp.matmul(spread, wide, precision=lax.Precision.HIGHEST)
