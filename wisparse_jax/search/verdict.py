"""Whether held-out windows show that a part of a method helps: by a margin that chance does not reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from wisparse_jax.evaluation import Figure

FEWEST = 4  # windows that a standard error is taken from
LEAST_WEIGHT = 0.1  # share of the windows from which on a kind has a say of its own
ERRORS = 2  # standard errors that the mean difference must be below zero by


class Verdict(NamedTuple):
    """What the windows say of a part."""

    kept: bool
    why: str  # of a part that is dropped, or that is kept without being judged; empty otherwise


def verdict(
    before: Float64[np.ndarray, " windows"], after: Float64[np.ndarray, " windows"], kinds: Sequence[str] = ()
) -> Verdict:
    """Whether a part is kept that changes the windows' KL: if it lowers it for all of them and for each kind.

    Lower means that the mean of the paired differences is below zero by two standard errors. A kind is asked if it
    weighs a tenth of the windows or more and has four of them at least; those of fewer windows are asked together,
    where they add up to as many. Fewer windows than four in all say nothing: the part is kept unjudged.

    Args:
        before: KL of each window without the part.
        after: the same with it.
        kinds: of text, one a window; none for one kind.
    """
    count = len(before)
    if count < FEWEST:
        return Verdict(True, f"kept unjudged: {count} held-out windows, expected {FEWEST} to judge by")
    for name, chosen in _groups(kinds, count):
        change = Figure.over((after - before)[chosen])
        if not change.mean + ERRORS * change.error < 0:
            where = f" of {name}" if name else ""
            return Verdict(
                False,
                f"dropped, held-out KL {after[chosen].mean():.4f} instead of {before[chosen].mean():.4f} "
                f"({change:+.4f} over {chosen.sum()} windows{where})",
            )
    return Verdict(True, "")


def _groups(kinds: Sequence[str], count: int) -> Iterator[tuple[str, Bool[np.ndarray, " windows"]]]:
    """All windows, then those of every kind that is asked, and of the small kinds together."""
    yield "", np.ones(count, bool)
    names = np.asarray(kinds or [""] * count)
    found = {str(name): names == name for name in dict.fromkeys(names.tolist())}
    small = np.zeros(count, bool)
    for name, chosen in found.items():
        if chosen.all():
            return
        if chosen.sum() < FEWEST:
            small |= chosen
        elif chosen.mean() >= LEAST_WEIGHT:
            yield name, chosen
    if FEWEST <= small.sum() < count and small.mean() >= LEAST_WEIGHT:
        yield "the other kinds", small
