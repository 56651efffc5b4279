"""Whether token ids look like text at all: a plan from a token that repeats itself fits no text."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int

from wisparse_jax.errors import WisparseError

# English in bytes, the least varied text that is meant, has 15 to 20 distinct tokens by entropy and repeats one in 50.
_DISTINCT, _REPEATED = 8.0, 1 / 3
_SHORTEST = 16  # tokens of a window about which anything can be said
_FEW = 1 / 4  # of the windows may be degenerate: a table, a row of dots


def check_variety(windows: Int[np.ndarray, "windows length"], vocab_size: int) -> None:
    """Refuse text that mostly repeats a token or goes round in a few.

    Of text that the model samples, that says that its beginning-of-sequence token or its weights are not what its
    configuration says they are.

    Raises:
        WisparseError: more than a quarter of the windows are degenerate: a third of their tokens equal the one before,
            or they hold, by entropy, fewer than 8 distinct tokens (fewer in a small vocabulary or a short window).
    """
    ids = np.asarray(windows)
    count, length = ids.shape
    if length < _SHORTEST:
        return
    repeated = np.mean(ids[:, 1:] == ids[:, :-1], axis=1)
    distinct = effective_distinct(ids)
    degenerate = (repeated > _REPEATED) | (distinct < min(_DISTINCT, length / 4, vocab_size / 4))
    if degenerate.mean() <= _FEW:
        return
    token, times = np.unique(ids[degenerate], return_counts=True)
    most = int(times.argmax())
    raise WisparseError(
        f"the text is degenerate: in {degenerate.sum()} of {count} windows a token repeats or a few go round; "
        f"expected text, found token {token[most]} in {times[most] / times.sum():.0%} of them"
    )


def effective_distinct(windows: Int[np.ndarray, "windows length"]) -> Float64[np.ndarray, " windows"]:
    """The number of equally frequent tokens with the entropy of each window."""

    def one(row: np.ndarray) -> float:
        shares = np.unique(row, return_counts=True)[1] / len(row)
        return float(np.exp(-np.sum(shares * np.log(shares))))

    return np.asarray([one(row) for row in windows], np.float64)
