"""Windows of token ids, checked before a model reads them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import LlamaConfig


def check_tokens(config: LlamaConfig, tokens: Int32[np.ndarray, "windows length"]) -> None:
    """Refuse windows that the model cannot read.

    Raises:
        WisparseError: no windows, too short or too long ones, or token ids outside the vocabulary.
    """
    count, length = tokens.shape
    if count < 1 or length < 2:
        raise WisparseError(f"expected at least one window of two tokens, found {count} of {length}")
    if length > config.context:
        raise WisparseError(f"windows of {length} tokens are longer than the model's context of {config.context}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        raise WisparseError(f"token id {low if low < 0 else high} is outside the vocabulary of {config.vocab_size}")
