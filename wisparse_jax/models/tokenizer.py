"""Text to token ids and back, by the tokenizer that a model folder holds."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wisparse_jax.errors import WisparseError

# What a folder's tokenizer is made of; any one of the first three is enough to build it.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
FILES = (
    *VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
TEMPLATES = "additional_chat_templates"  # a folder of further templates


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A thin wrapper around a transformers tokenizer."""

    inner: Any

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of a text, after the beginning-of-sequence token if the tokenizer puts one before a text itself.

        Nothing else is added: no end of sequence, no chat template.
        """
        ids = list(self.inner.encode(text, add_special_tokens=False))
        first = list(self.inner.encode("", add_special_tokens=True))[:1]
        return first + ids if bos and first and first[0] == self.inner.bos_token_id else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included; a model's own vocabulary may be padded beyond it."""
        return len(self.inner)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder; no code from the folder runs.

    Raises:
        WisparseError: there is none, or it is damaged; names the folder.
    """
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise WisparseError(f"{folder}: no tokenizer: expected one of {', '.join(VOCABULARIES)}, found none")
    # Keeps transformers from advising to install PyTorch, which tokenizers do not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        # Books are encoded whole and cut into windows: the length that a tokenizer warns beyond means nothing here.
        inner = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, model_max_length=sys.maxsize
        )
        return Tokenizer(inner)
    except Exception as error:  # the Rust tokenizers raise a bare Exception for a damaged file
        raise WisparseError(f"{folder}: the tokenizer is not readable: {error}") from None
