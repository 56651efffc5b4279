"""Text as windows of token ids."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from wisparse_jax.arguments import check_count
from wisparse_jax.errors import WisparseError
from wisparse_jax.files import check_regular, expanded

UNSURE = 256  # tokens before a cut that may be others than those of the whole text

# Positions at the start of a text that stay dense in scoring, whatever the share that is to be sparse, as they do in
# generation: attention rests on the first, whose values are unlike all others, and 86 % of which would be skipped.
DENSE_FIRST = 1


@runtime_checkable
class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids, with the model's BOS in front if `bos` and the tokenizer has one."""
        ...


def text_windows(
    tokenizer: Encoder, path: str | Path, window: int, tokens: int | None = None
) -> Int32[np.ndarray, "windows window"]:
    """Consecutive windows of a text file that do not overlap; see `split_windows`.

    Raises:
        WisparseError: the file cannot be read, is not UTF-8, or is too short for one window.
    """
    text = read_text(path)
    try:
        return split_windows(tokenizer, text, window, tokens)
    except WisparseError as error:
        raise WisparseError(f"{path}: {error}") from None


def read_text(path: str | Path) -> str:
    """A text file, without the byte-order mark that some editors put in front.

    Raises:
        WisparseError: the file cannot be read, is a device, which may have no end, or is not UTF-8.
    """
    try:
        path = expanded(path)
        mode = os.stat(path).st_mode
        if stat.S_ISCHR(mode):
            raise WisparseError(f"{path}: a device: expected a file")
        if stat.S_ISREG(mode):
            check_regular(path, WisparseError)
        return path.read_text(encoding="utf-8-sig")
    except WisparseError:  # a ValueError too
        raise
    except FileNotFoundError:
        raise WisparseError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise WisparseError(f"{path}: not UTF-8 text: {error}") from None
    except (OSError, ValueError) as error:  # a ValueError for a name with a NUL in it
        raise WisparseError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def split_windows(
    tokenizer: Encoder, text: str, window: int, tokens: int | None = None
) -> Int32[np.ndarray, "windows window"]:
    """The first `tokens` tokens of the text (all, if None) in windows, rounded up to whole ones.

    Each window starts with BOS where the tokenizer has one, as every prompt does; the rest of a last window is left.

    Raises:
        WisparseError: too little text for one window, or numbers out of range.
    """
    check_count(window, "window, in tokens", least=2)
    if tokens is not None:
        check_count(tokens, "tokens", least=1)
    bos = tokenizer.encode("", bos=True)
    body = window - len(bos)
    if body < 1:
        raise WisparseError(f"window = {window}: the tokenizer puts {len(bos)} tokens before a text, which fill it")
    wanted = None if tokens is None else -(-tokens // window)
    # No need to encode a long file whole for a few windows; the last tokens before a cut are not those of the text.
    cut = len(text) if wanted is None else 16 * (wanted * window + UNSURE)
    ids = tokenizer.encode(text[:cut], bos=False)
    while cut < len(text) and len(ids) < (wanted or 0) * body + UNSURE:
        cut *= 4
        ids = tokenizer.encode(text[:cut], bos=False)
    count = len(ids) // body
    if wanted is not None:
        count = min(count, wanted)
    if count < 1:
        raise WisparseError(f"holds {len(ids)} tokens, too few for one window of {window}")
    rows = np.asarray(ids[: count * body], np.int32).reshape(count, body)
    return np.concatenate([np.tile(np.asarray(bos, np.int32), (count, 1)), rows], axis=1)
