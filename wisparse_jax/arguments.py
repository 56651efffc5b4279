"""Checks of arguments that several functions and commands take, and nothing heavy to import for them."""

from __future__ import annotations

import numbers
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
