"""BLiMP: how often the grammatical sentence of a pair is the likelier one, under sparse models too.

The first half of every sentence runs dense, the second sparse, as in generation. Sentences are padded on both sides
such that their halves meet in one column, so that one program serves them all.
"""

from __future__ import annotations

import functools
import json
import lzma
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int

from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.forward import Cache, Params, head, hidden_states, layout
from wisparse_jax.models.llama import Llama
from wisparse_jax.models.rules import Rules
from wisparse_jax.models.tokenizer import Tokenizer
from wisparse_jax.sparsity import SparseLlama

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
    if bad := [text for pair in read for text in pair if not isinstance(text, str)]:
        raise WisparseError(f"{path}: expected sentences of text, found {bad[0]!r}")
    if pairs is None or pairs >= len(read):
        return read
    return [read[i * len(read) // pairs] for i in range(pairs)]


def accuracies(
    model: Llama, tokenizer: Tokenizer, pairs: list[tuple[str, str]], plans: Mapping[str, SparseLlama]
) -> dict[str, float]:
    """The share of pairs whose good sentence is the likelier, of the dense model ("dense") and of each plan."""
    return {name: float(np.mean(values)) for name, values in judgements(model, tokenizer, pairs, plans).items()}


def judgements(
    model: Llama, tokenizer: Tokenizer, pairs: list[tuple[str, str]], plans: Mapping[str, SparseLlama]
) -> dict[str, Bool[np.ndarray, " pairs"]]:
    """Whether the good sentence of each pair is the likelier, for the dense model ("dense") and for each plan."""
    sentences = [tokenizer.encode(sentence) for pair in pairs for sentence in pair]  # good, bad, good, bad, ...
    found = log_likelihoods(model, sentences, plans)
    return {name: values[::2] > values[1::2] for name, values in found.items()}


def log_likelihoods(
    model: Llama, sentences: list[list[int]], plans: Mapping[str, SparseLlama]
) -> dict[str, Float64[np.ndarray, " sentences"]]:
    """Of each sentence but its first token, by the dense model ("dense") and by each plan from its middle on.

    Raises:
        WisparseError: a sentence of fewer than two tokens.
    """
    lengths = np.array([len(ids) for ids in sentences])
    if lengths.min() < 2:
        raise WisparseError("a sentence has fewer than two tokens")
    halves = lengths // 2
    split = int(halves.max())  # the column where all second halves begin
    ids = np.zeros((len(sentences), split + int((lengths - halves).max())), np.int32)
    for row, (own, half) in enumerate(zip(sentences, halves, strict=True)):
        ids[row, split - half : split - half + len(own)] = own
    starts = split - halves
    found = {name: np.zeros(len(sentences)) for name in ("dense", *plans)}
    for at in range(0, len(ids), SENTENCES_AT_ONCE):
        rows = np.arange(at, min(at + SENTENCES_AT_ONCE, len(ids)))
        filled = np.resize(rows, SENTENCES_AT_ONCE)  # one size, one program
        start, end = starts[filled], starts[filled] + lengths[filled]
        batch = jnp.asarray(ids[filled]), jnp.asarray(start, jnp.int32)
        column = np.arange(1, ids.shape[1])  # of the token that is predicted
        counted = (column > start[:, None]) & (column < end[:, None])
        log_p = np.where(counted, _dense(model.config, model.params, *batch)[0], 0.0)
        found["dense"][rows] = log_p.sum(axis=1)[: len(rows)]
        for name, plan in plans.items():
            cache = _dense(plan.config, plan.params, *batch)[1]
            second = _sparse(plan.config, split, plan.params, *batch, cache, plan.rules)
            second = np.where(counted[:, split:], second, 0.0)
            found[name][rows] = (log_p[:, :split].sum(axis=1) + second.sum(axis=1))[: len(rows)]
    return found


@functools.partial(jax.jit, static_argnums=0)
def _dense(
    config: LlamaConfig, params: Params, ids: Int[Array, "batch length"], start: Int[Array, " batch"]
) -> tuple[Float[Array, "batch length-1"], Cache]:
    """Log-probabilities of all tokens but the first column's, and the cache."""
    hidden, cache = hidden_states(config, params, ids, layout(config, ids.shape[0], ids.shape[1], 0, start))
    return _log_p(head(params, hidden[:, :-1]), ids[:, 1:]), cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sparse(
    config: LlamaConfig,
    split: int,
    params: Params,
    ids: Int[Array, "batch length"],
    start: Int[Array, " batch"],
    cache: Cache,
    rules: Rules,
) -> Float[Array, "batch length-split-1"]:
    """Log-probabilities of the tokens after column `split`, with everything from there on sparse."""
    where = layout(config, ids.shape[0], ids.shape[1] - split, split, start)
    hidden, _ = hidden_states(config, params, ids[:, split:], where, cache, rules)
    return _log_p(head(params, hidden[:, :-1]), ids[:, split + 1 :])


def _log_p(logits: Float[Array, "batch positions vocab"], ids: Int[Array, "batch positions"]) -> Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1)[..., 0]
