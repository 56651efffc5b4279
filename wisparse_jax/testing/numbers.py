"""Random numbers, and how far apart numbers are."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from numpy.typing import ArrayLike


def normal(seed: int, *shape: int, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
    """Normal numbers from NumPy: JAX's would compile for every shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def relative_error(found: ArrayLike, expected: ArrayLike) -> float:
    """The norm of the difference, over that of what is expected; infinite where either is no finite number alone.

    What is not finite must be so in both: an infinity of the same sign, or a NaN.
    """
    one, other = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    real = np.isfinite(other)
    if not np.array_equal(np.where(real, 0, other), np.where(np.isfinite(one), 0, one), equal_nan=True):
        return np.inf
    return float(np.linalg.norm(one[real] - other[real]) / max(np.linalg.norm(other[real]), 1e-30))
