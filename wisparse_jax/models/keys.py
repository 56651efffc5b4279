"""Random keys of seeds."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt32

from wisparse_jax.arguments import check_seed
from wisparse_jax.errors import WisparseError


def random_key(seed: int) -> Key[Array, ""]:
    """The key of a seed; JAX alone would take seeds that differ by 2**32 for one.

    Raises:
        WisparseError: see `check_seed`.
    """
    high, low = divmod(check_seed(seed), 2**32)
    key = jax.random.key(np.uint32(low))
    return jax.random.fold_in(key, np.uint32(high)) if high else key


def seed_words(seed: int | Sequence[int], rows: int) -> UInt32[np.ndarray, "rows 3"]:
    """Low and high word of each row's seed, and the row's number: of one seed for all, or 0 where each has its own.

    Raises:
        WisparseError: see `check_seed`; also as many seeds as there are not rows.
    """
    own = isinstance(seed, Sequence)
    seeds = [check_seed(value) for value in seed] if isinstance(seed, Sequence) else [check_seed(seed)] * rows
    if len(seeds) != rows:
        raise WisparseError(f"seed: expected one for all, or one for each of {rows} prompts, found {len(seeds)}")
    words = [(value % 2**32, value // 2**32, 0 if own else row) for row, value in enumerate(seeds)]
    return np.asarray(words, np.uint32).reshape(rows, 3)


def row_keys(words: UInt32[Array, "rows 3"]) -> Key[Array, " rows"]:
    """What `random_key` makes of each row's seed, and the row's number folded in; to be called inside a jit."""

    def row_key(low: Array, high: Array, row: Array) -> Array:
        key = jax.random.key(low)
        return jax.random.fold_in(jnp.where(high > 0, jax.random.fold_in(key, high), key), row)

    return jax.vmap(row_key)(words[:, 0], words[:, 1], words[:, 2])
