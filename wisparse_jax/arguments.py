"""Checks of arguments that several functions and commands take, and nothing heavy to import for them."""

from __future__ import annotations

import hashlib
import numbers
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from wisparse_jax.errors import WisparseError

LARGEST_SEED = 2**63 - 1


def check_seed(seed: Any, name: str = "seed") -> int:
    """Refuse what is no seed; the one rule for all that is random.

    Raises:
        WisparseError: not a whole number from 0 to 2**63 - 1.
    """
    whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)  # NumPy's integers too
    if not whole or not 0 <= int(seed) <= LARGEST_SEED:
        raise WisparseError(f"{name} = {seed!r}: expected a whole number from 0 to {LARGEST_SEED}")
    return int(seed)


def request_seeds(seed: int | None, requests: Sequence[Hashable]) -> list[int]:
    """A seed for each request and each of its repeats, whatever else is asked for and in which order.

    Args:
        seed: what they come from; None is the state of NumPy's global generator, which is left as it is.
        requests: what tells them apart; equal ones are repeats.
    """
    import numpy as np

    base: Any = seed
    if base is None:
        base = [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]
    seen: Counter[Hashable] = Counter()
    seeds = []
    for request in requests:
        digest = hashlib.sha256(repr((base, request, seen[request])).encode("utf-8", "surrogatepass")).digest()
        seeds.append(int.from_bytes(digest[:8], "little") >> 1)
        seen[request] += 1
    return seeds


def check_count(value: Any, name: str, least: int) -> int:
    """Refuse what is no number of things.

    Raises:
        WisparseError: not a whole number, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise WisparseError(f"{name} = {value!r}: expected {least} or above, a whole number")
    return value


def check_share(value: Any, name: str, least: str = "above 0") -> float:
    """Refuse what is no share.

    Raises:
        WisparseError: not a number above 0 (or 0 or above, if `least` says "0 or above") and at most 1.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or (value == 0 and least == "above 0"):
        raise WisparseError(f"{name} = {value!r}: expected a share, {least}, at most 1{percent_hint(value)}")
    return value


def percent_hint(value: Any) -> str:
    """What to add to a message about a share that looks like a percentage, such as ' (did you mean 0.5?)'."""
    percent = isinstance(value, int | float) and not isinstance(value, bool) and 1 < value <= 100
    return f" (did you mean {value / 100:g}?)" if percent else ""
