"""Log-likelihoods of continuations, for evaluation tasks: requests of any length in few compiled shapes."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wisparse_jax.bars import bar
from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation.windows import DENSE_FIRST
from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.forward import Params, empty_cache, head, hidden_states, layout
from wisparse_jax.models.model import Model
from wisparse_jax.models.rules import Rules

TOKENS_AT_ONCE = 2048
SMALLEST = 8  # tokens of the smallest shape; the others are powers of two


class Request(NamedTuple):
    """A continuation to score after its context; token ids, at least one of each."""

    context: Sequence[int]
    continuation: Sequence[int]


class _Row(NamedTuple):
    """A request as the model reads it: its inputs, how many of them run dense, and what the last ones predict."""

    number: int
    inputs: Sequence[int]
    dense: int
    targets: Sequence[int]


def score_continuations(
    model: Model,
    requests: Sequence[Request],
    sparse_prefill: float = 0.5,
    tokens_at_once: int = TOKENS_AT_ONCE,
    progress: bool = False,
    dense_first: int = DENSE_FIRST,
) -> list[tuple[float, bool]]:
    """The log-probability of each continuation, in nats, and whether it is the greedy one.

    A sparse model runs the last `sparse_prefill` of a context's tokens sparse, but for its first `dense_first`, and the
    whole continuation. Requests longer than the model's context lose tokens at their beginning. They are batched by
    length in shapes that are powers
    of two, so that other requests of like lengths compile nothing; how they are batched changes no result beyond
    rounding.

    Raises:
        WisparseError: a share outside [0, 1], an empty context or continuation, one longer than the model's context,
            or token ids outside the vocabulary.
    """
    if not 0 <= sparse_prefill <= 1:
        raise WisparseError(f"sparse-prefill = {sparse_prefill}: expected a share from 0 to 1")
    share = 1.0 if model.rules is None else sparse_prefill
    rows = [_row(model.config, number, request, share, dense_first) for number, request in enumerate(requests)]
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
    with bar(total=len(rows), desc="scoring", disable=not progress, leave=False) as shown:
        for (dense, rest, scored), batch in _batches(rows, tokens_at_once):
            arrays = _padded(batch, dense, rest, scored)
            total, greedy = _score(model.config, dense, model.params, *arrays, model.rules)
            for row, value, best in zip(batch, np.asarray(total), np.asarray(greedy), strict=False):
                scores[row.number] = (float(value), bool(best))
            shown.update(len(batch))
    return scores


def _row(config: LlamaConfig, number: int, request: Request, share: float, dense_first: int) -> _Row:
    context, targets = request
    if not context or not 0 < len(targets) <= config.context:
        raise WisparseError(
            f"request {number}: expected a context and a continuation of 1 to {config.context} tokens, found "
            f"{len(context)} and {len(targets)} tokens"
        )
    # The last token is predicted, never read.
    inputs = [*context, *targets][-config.context - 1 : -1]
    if not all(0 <= token < config.vocab_size for token in (*inputs, targets[-1])):
        raise WisparseError(f"request {number}: token ids outside the vocabulary of {config.vocab_size}")
    prompt = len(inputs) - len(targets) + 1
    dense = max(prompt - round(prompt * share), min(dense_first, prompt))
    return _Row(number, inputs, dense, targets)


def _bucket(size: int) -> int:
    return max(SMALLEST, 1 << (size - 1).bit_length()) if size else 0


def _batches(rows: list[_Row], tokens_at_once: int) -> Iterator[tuple[tuple[int, int, int], list[_Row]]]:
    """Rows that share a shape: slots for the dense part, for the rest, and scored positions; the longest first."""
    groups: dict[tuple[int, int, int], list[_Row]] = defaultdict(list)
    for row in rows:
        groups[_bucket(row.dense), _bucket(len(row.inputs) - row.dense), _bucket(len(row.targets))].append(row)
    for shape in sorted(groups, reverse=True):
        size = max(1, tokens_at_once // (shape[0] + shape[1]))
        for at in range(0, len(groups[shape]), size):
            yield shape, groups[shape][at : at + size]


def _padded(batch: list[_Row], dense: int, rest: int, scored: int) -> tuple[np.ndarray, ...]:
    """Tokens, where each row starts, and slots and targets of its scored positions; targets are -1 where there is none.

    The dense parts end at one slot, where the others begin: the first padded on the left, the second on the right,
    whose padding no real token sees.
    """
    size = 1 << (len(batch) - 1).bit_length()
    tokens, start = np.zeros((size, dense + rest), np.int32), np.full(size, dense, np.int32)
    slots, targets = np.zeros((size, scored), np.int32), np.full((size, scored), -1, np.int32)
    for b, row in enumerate(batch):
        start[b] = dense - row.dense
        end, count = start[b] + len(row.inputs), len(row.targets)
        tokens[b, start[b] : end] = row.inputs
        slots[b, :count], targets[b, :count] = np.arange(end - count, end), row.targets
    return tokens, start, slots, targets


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    config: LlamaConfig,
    dense: int,
    params: Params,
    tokens: Int[Array, "batch length"],
    start: Int[Array, " batch"],
    slots: Int[Array, "batch scored"],
    targets: Int[Array, "batch scored"],
    rules: Rules | None,
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """Sums of the targets' log-probabilities, and whether all are the most likely tokens; `dense` slots run dense."""
    batch, length = tokens.shape
    cache, parts = None, []
    if dense:
        cache = empty_cache(config, batch, length, params["embed"].dtype)
        first = layout(config, batch, dense, 0, start)
        hidden, cache = hidden_states(config, params, tokens[:, :dense], first, cache)
        parts.append(hidden)
    if length > dense:
        rest = layout(config, batch, length - dense, dense, start)
        parts.append(hidden_states(config, params, tokens[:, dense:], rest, cache, rules)[0])
    logits = head(params, jnp.take_along_axis(jnp.concatenate(parts, axis=1), slots[..., None], axis=1))
    real = targets >= 0
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    log_probs = jnp.where(real, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)
    return log_probs.sum(axis=1), jnp.all((jnp.argmax(logits, axis=-1) == targets) | ~real, axis=1)
