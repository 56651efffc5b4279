"""Text to token ids and back, by the tokenizer that a model folder holds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wisparse_jax.errors import WisparseError
from wisparse_jax.files import read_bytes
from wisparse_jax.files.reading import LARGE
from wisparse_jax.models.tokenizer_check import check_tokenizer, contained

# What a folder's tokenizer is made of, as patterns; any one of the first three is enough to build it.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
FILES = (
    *VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
# Classes that transformers takes for a `llama` model whose tokenizer_config.json names them, whatever else it holds.
CERTAIN = ("GPT2Tokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A thin wrapper around a transformers tokenizer."""

    inner: Any

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of a text, after what the tokenizer itself puts before one (BOS, or nothing).

        These are transformers' ids without what is put after a text: no end of sequence, which a continuation or the
        next window would have to follow. No chat template either.

        Raises:
            WisparseError: the text holds what is no character (a lone surrogate, as from bytes that are not UTF-8).
        """
        return [*(self.prefix if bos else ()), *self._plain(text)]

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of token ids, without special tokens; with `after`, what they add to the text of those ids.

        A continuation needs its prompt: by themselves the first of its tokens may lose their space, or are the second
        half of a character.
        """
        before, both = self._text(after), self._text([*after, *ids])
        return both[shared_start(before, both) :]

    def special(self, token: int) -> str:
        """How a special token is written, which `decode` leaves out; nothing for any other."""
        if self._text([token]):
            return ""
        with contained("the tokenizer cannot decode these tokens"):
            return self.inner.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @functools.cached_property
    def prefix(self) -> tuple[int, ...]:
        """The ids that the tokenizer puts before every text."""
        for probe in self._probes():
            plain = self._plain(probe)
            if not plain:
                continue
            with contained("the tokenizer cannot encode this text"):
                whole = self.inner(probe, add_special_tokens=True, return_special_tokens_mask=True)
            ids, added = list(whole["input_ids"]), list(whole["special_tokens_mask"])
            count = next((i for i, special in enumerate(added) if not special), 0)
            if ids[count : count + len(plain)] == plain:
                return tuple(ids[:count])
        raise WisparseError("the tokenizer has no token for any text, or changes a text that it puts BOS before")

    @functools.cached_property
    def open_byte(self) -> int | None:
        """A token that begins a character and does not end it, where bytes are tokens that fall back on each other."""
        name = "<0xE2>"
        found = self.inner.convert_tokens_to_ids(name)
        return found if found is not None and self.inner.convert_ids_to_tokens(found) == name else None

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included; a model's own vocabulary may be padded beyond it."""
        return len(self.inner)

    def _plain(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise WisparseError(
                f"not UTF-8 text: found {text[error.start]!a}, which is no character, at position {error.start}"
            ) from None
        with contained("the tokenizer cannot encode this text"):
            return list(self.inner.encode(text, add_special_tokens=False))

    def _text(self, ids: Sequence[int]) -> str:
        with contained("the tokenizer cannot decode these tokens"):
            return self.inner.decode(
                [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )

    def _probes(self) -> Iterator[str]:
        """Short texts, one of which has a token in any vocabulary."""
        yield from ("a", "the", "1")
        special = set(self.inner.all_special_ids)
        yield from (self._text([i]) for i in range(len(self.inner)) if i not in special)


def files(folder: Path) -> list[str]:
    """The names of the files in a folder that its tokenizer is made of."""
    return [str(path.relative_to(folder)) for pattern in FILES for path in sorted(folder.glob(pattern))]


def shared_start(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return len(os.path.commonprefix([a, b]))  # noqa: RUF071 - characters are meant


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder; no code from the folder runs.

    Raises:
        WisparseError: there is none, or it is damaged; names the folder.
    """
    if not any(os.path.lexists(folder / name) for name in VOCABULARIES):
        raise WisparseError(f"{folder}: no tokenizer: expected one of {', '.join(VOCABULARIES)}, found none")
    # Keeps transformers from advising to install PyTorch, which tokenizers do not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    check_tokenizer(folder, [*FILES, *files(folder)])
    tokenizer_class = _tokenizer_class(folder)
    try:
        with contained(f"{folder}: the tokenizer is not readable"):
            # Books are encoded whole and cut into windows: the length that a tokenizer warns beyond means nothing here.
            inner = tokenizer_class.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, model_max_length=sys.maxsize
            )
    except WisparseError:
        if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            raise
        # A vocabulary alone does not say how text is cut.
        raise WisparseError(
            f"{folder}: no tokenizer can be made of vocab.json as it is: expected tokenizer.json, or merges.txt and a "
            "tokenizer_config.json whose tokenizer_class says of which kind it is, such as GPT2Tokenizer"
        ) from None
    return Tokenizer(inner)


def _tokenizer_class(folder: Path) -> Any:
    """The class that reads a folder's tokenizer: AutoTokenizer, or at once what it would choose where that is certain.

    It imports PyTorch where that is installed, which takes as long as reading the weights of an 8B model.
    """
    import transformers

    # What is damaged is for transformers to refuse, which reads it again.
    with contextlib.suppress(WisparseError, ValueError, RecursionError):
        config, settings = (
            json.loads(read_bytes(folder / name, WisparseError, LARGE))
            for name in ("config.json", "tokenizer_config.json")
        )
        if isinstance(config, dict) and isinstance(settings, dict) and (folder / "tokenizer.json").is_file():
            name = settings.get("tokenizer_class")
            if config.get("model_type") == "llama" and name in CERTAIN and "auto_map" not in settings:
                return getattr(transformers, name)
    return transformers.AutoTokenizer
