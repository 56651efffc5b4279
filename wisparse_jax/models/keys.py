"""Random keys of seeds."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Array, Key

from wisparse_jax.arguments import check_seed


def random_key(seed: int) -> Key[Array, ""]:
    """The key of a seed; JAX alone would take seeds that differ by 2**32 for one.

    Raises:
        WisparseError: see `check_seed`.
    """
    high, low = divmod(check_seed(seed), 2**32)
    key = jax.random.key(np.uint32(low))
    return jax.random.fold_in(key, np.uint32(high)) if high else key
