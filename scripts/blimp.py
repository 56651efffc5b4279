"""BLiMP: how often the grammatical sentence of a pair is the likelier one, under sparse models too.

The first half of every sentence runs dense, the second sparse, as in generation. Its log-likelihood is then the dense
model's on the first half and the sparse model's on the second, which `evaluate` gives for sentences of one length.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation import evaluate
from wisparse_jax.models.llama import Llama
from wisparse_jax.models.tokenizer import Tokenizer
from wisparse_jax.sparsity import SparseLlama

SHORTEST = 4  # tokens: a shorter sentence has no two halves to speak of
SHARE = 0.5
SENTENCES_AT_ONCE = 64


def read_pairs(path: str | Path, pairs: int | None = None) -> list[tuple[str, str]]:
    """(good, bad) sentences of a jsonl file, plain or xz; `pairs` of them, evenly spaced over the file.

    Raises:
        WisparseError: not readable, or a line without the two sentences.
    """
    try:
        opened = lzma.open if str(path).endswith(".xz") else open
        with opened(path, "rt", encoding="utf-8") as file:
            lines = [json.loads(line) for line in file if line.strip()]
        read = [(line["sentence_good"], line["sentence_bad"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, lzma.LZMAError) as error:
        raise WisparseError(f"{path}: expected lines of JSON with sentence_good and sentence_bad: {error}") from None
    if not read:
        raise WisparseError(f"{path}: holds no pairs")
    if pairs is None or pairs >= len(read):
        return read
    return [read[i * len(read) // pairs] for i in range(pairs)]


def accuracies(
    model: Llama, tokenizer: Tokenizer, pairs: list[tuple[str, str]], plans: Mapping[str, SparseLlama]
) -> tuple[dict[str, float], int]:
    """The share of pairs whose good sentence is the likelier, of the dense model ("dense") and of each plan.

    Returns:
        The shares, and how many pairs they are over: those of which a sentence is too short are left out.
    """
    encoded = [tuple(tokenizer.encode(sentence) for sentence in pair) for pair in pairs]
    kept = [pair for pair in encoded if min(map(len, pair)) >= SHORTEST]
    if not kept:
        raise WisparseError(f"BLiMP: no pair of sentences of at least {SHORTEST} tokens")
    sentences = [ids for pair in kept for ids in pair]  # good, bad, good, bad, ...
    scores = {name: np.zeros(len(sentences)) for name in ("dense", *plans)}
    for rows, ids in _of_one_length(sentences):
        first = ids.shape[1] - round(ids.shape[1] * SHARE)
        result = evaluate(model, ids, plans, SHARE)
        log_p = jax.nn.log_softmax(model(ids[:, :first]))
        # evaluate scores the tokens from first + 1 on; token first is predicted by the last dense position.
        rows_of_it, at = np.arange(len(ids))[:, None], np.arange(first)
        before = np.asarray(log_p[rows_of_it, at, ids[:, 1 : first + 1]], np.float64).sum(axis=1)
        for name, score in {"dense": result.dense, **result.sparse}.items():
            scores[name][rows] = (before - score.nll * result.scored_positions)[: len(rows)]
    good = {name: float(np.mean(values[::2] > values[1::2])) for name, values in scores.items()}
    return good, len(kept)


def _of_one_length(sentences: list[list[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Which sentences, and their tokens, in batches of one length and one size: few programs to compile."""
    lengths = np.array([len(ids) for ids in sentences])
    for length in np.unique(lengths):
        of_it = np.flatnonzero(lengths == length)
        for at in range(0, len(of_it), SENTENCES_AT_ONCE):
            rows = of_it[at : at + SENTENCES_AT_ONCE]
            filled = np.resize(rows, SENTENCES_AT_ONCE)
            yield rows, np.array([sentences[i] for i in filled], np.int32)
