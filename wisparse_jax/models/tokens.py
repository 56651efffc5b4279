"""Token ids that a caller gives: whole numbers of the vocabulary, in rows, before they become int32."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int32

from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import LlamaConfig


def token_rows(tokens: Any, vocab_size: int, what: str = "tokens") -> Int32[np.ndarray, "rows length"]:
    """Rows of token ids as int32, from an array or from lists of the same length.

    Raises:
        WisparseError: text, numbers that are not whole, another number of dimensions, rows of different lengths, or
            ids outside the vocabulary; the message begins with `what`.
    """
    return _checked(tokens, vocab_size, 2, what)


def token_row(tokens: Any, vocab_size: int, what: str = "tokens") -> Int32[np.ndarray, " length"]:
    """One row of token ids as int32, as `token_rows`; it may be empty."""
    return _checked(tokens, vocab_size, 1, what)


def token_windows(config: LlamaConfig, tokens: Any, what: str = "tokens") -> Int32[np.ndarray, "windows length"]:
    """Windows of token ids as int32, as `token_rows`, that a model can read and predict.

    Raises:
        WisparseError: as `token_rows`; also no windows, too short or too long ones.
    """
    windows = token_rows(tokens, config.vocab_size, what)
    count, length = windows.shape
    if count < 1 or length < 2:
        raise WisparseError(f"expected at least one window of two tokens, found {count} of {length}")
    if length > config.context:
        raise WisparseError(f"windows of {length} tokens are longer than the model's context of {config.context}")
    return windows


def _checked(tokens: Any, vocab_size: int, dimensions: int, what: str) -> np.ndarray:
    expected = f"{what}: expected {'rows of token ids' if dimensions == 2 else 'token ids'}"
    if isinstance(tokens, str | bytes):
        raise WisparseError(f"{expected}, found text; a tokenizer's encode gives its ids")
    try:
        ids = np.asarray(tokens)
    except (ValueError, OverflowError):  # lists of different lengths
        raise WisparseError(f"{expected} of one length, found lists of different ones") from None
    if ids.dtype.kind in "US":
        raise WisparseError(f"{expected}, found text; a tokenizer's encode gives its ids")
    if ids.ndim != dimensions:
        raise WisparseError(f"{expected}, {dimensions} dimension(s), found {ids.ndim}: shape {ids.shape}")
    if ids.size == 0:
        return ids.astype(np.int32)
    if ids.dtype.kind == "O" and all(isinstance(i, int) for i in ids.flat):  # beyond 64 bits
        pass
    elif ids.dtype.kind not in "iu":
        raise WisparseError(f"{expected}, whole numbers, found {ids.dtype}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise WisparseError(f"{what}: token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")
    return ids.astype(np.int32)
