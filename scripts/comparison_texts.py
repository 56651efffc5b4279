"""Texts of the comparisons: `name=FILE`, `name=FILE@start:stop` for a part of it in characters, or `self`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from wisparse_jax.calibration import check_variety
from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation import split_windows
from wisparse_jax.inference import sample_windows
from wisparse_jax.models.llama import Llama
from wisparse_jax.models.tokenizer import Tokenizer


def split_name(spec: str) -> tuple[str, str]:
    """`name=file` taken apart; `self` is its own name.

    Raises:
        WisparseError: neither.
    """
    name, _, file = spec.partition("=")
    if not name or (not file and name != "self"):
        raise WisparseError(f"{spec!r}: expected name=FILE, name=FILE@start:stop, or self")
    return name, file


def read_text(spec: str) -> str:
    """The text of a file, or the part of it between two characters.

    Raises:
        WisparseError: the file cannot be read, or is not UTF-8.
    """
    file = split_name(spec)[1]
    part = re.fullmatch(r"(.*)@(\d*):(\d*)", file)
    path, start, stop = part.groups() if part else (file, "", "")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WisparseError(f"{path}: cannot be read as text: {error}") from None
    return text[int(start or 0) : int(stop) if stop else None]


def read_windows(
    spec: str, model: Llama, tokenizer: Tokenizer, window: int, tokens: int | None, seed: int
) -> np.ndarray:
    """The windows of a text, or as many that the model samples.

    Raises:
        WisparseError: no such text, too little of it, or text of one token only.
    """
    name, _ = split_name(spec)
    window = min(window, model.config.context)
    if name == "self":
        windows = sample_windows(model, -(-(tokens or 16_384) // window), window, seed=seed)
    else:
        try:
            windows = split_windows(tokenizer, read_text(spec), window, tokens)
        except WisparseError as error:
            raise WisparseError(f"{spec}: {error}") from None
    check_variety(windows, model.config.vocab_size)
    return windows
