"""How documents begin that a model goes on from where it writes its own calibration text."""

from __future__ import annotations

import hashlib
import importlib.resources
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from wisparse_jax.inference.text import encode_prompt
from wisparse_jax.models.tokenizer import Tokenizer

FILE = "openers.yaml"
CHAT, LANGUAGES = "chat", "languages"
# Tokens a byte, in those of English prose by the same tokenizer, beyond which a vocabulary is taken not to be made for
# a text, nor the model to know what follows.
MOST_TOKENS = 1.6


class Openers(NamedTuple):
    """Beginnings of documents as tokens, without BOS."""

    tokens: Int32[np.ndarray, "openers longest"]  # -1 after an opener's last token
    kinds: tuple[str, ...]

    def __str__(self) -> str:
        """How many there are, and which: for a record."""
        digest = hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()
        return f"{len(self.kinds)} openers, {digest[:8]}"


NONE = Openers(np.zeros((1, 0), np.int32), ())


def openers_for(tokenizer: Tokenizer) -> Openers:
    """Those of the package that a model can go on from, one kind after another, so that any few are of many kinds.

    A model with a chat template gets them all but for languages that its vocabulary was not made for, and in turn with
    them questions of a user in its template, to be answered; another model gets what its vocabulary was made for.

    Raises:
        WisparseError: the chat template refuses a question.
    """
    chats = tokenizer.inner.chat_template is not None
    texts = _texts()
    encoded = {kind: [tokenizer.encode(text, bos=False) for text in own] for kind, own in texts.items()}
    sizes = {kind: [len(text.encode()) for text in own] for kind, own in texts.items()}
    usual = sum(map(len, encoded["prose"])) / sum(sizes["prose"])
    questions = texts[CHAT] if chats else []
    del encoded[CHAT]
    for kind, own in encoded.items():
        if kind == LANGUAGES or not chats:
            pairs = zip(own, sizes[kind], strict=True)
            encoded[kind] = [ids for ids, size in pairs if len(ids) <= MOST_TOKENS * usual * size]
    named = [[(kind, ids) for ids in own] for kind, own in encoded.items()]
    start, asked = tokenizer.inner.bos_token_id, []
    for question in questions:
        ids = encode_prompt(tokenizer, question)
        asked.append((CHAT, ids[1:] if ids[0] == start else ids))
    found = _in_turn([_in_turn(named), asked])
    longest = max(len(ids) for _, ids in found)
    rows = [[*ids, *[-1] * (longest - len(ids))] for _, ids in found]
    return Openers(np.asarray(rows, np.int32), tuple(kind for kind, _ in found))


def _in_turn(lists: list[list[tuple[str, list[int]]]]) -> list[tuple[str, list[int]]]:
    """The first of every list, then the second, and so on."""
    return [one for row in itertools.zip_longest(*lists) for one in row if one is not None]


def _texts() -> dict[str, list[str]]:
    import yaml

    return yaml.safe_load((importlib.resources.files("wisparse_jax.inference") / FILE).read_text(encoding="utf-8"))
