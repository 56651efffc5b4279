"""Random numbers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def normal(seed: int, *shape: int, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
    """Normal numbers from NumPy: JAX's would compile for every shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))
