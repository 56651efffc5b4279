"""Text from a model, dense or sparse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from wisparse_jax.arguments import check_count
from wisparse_jax.errors import WisparseError
from wisparse_jax.inference.loop import decode, prefill, tokens_together
from wisparse_jax.inference.sampling import GREEDY, NOT_FINITE, Sample
from wisparse_jax.inference.steps import decode_implementation
from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.control import Control
from wisparse_jax.models.keys import seed_words
from wisparse_jax.models.mesh import data_size, mesh_of, on_host, spread
from wisparse_jax.models.model import Model
from wisparse_jax.models.tokens import token_row

# Tokens between two looks at what the loop has written, when somebody streams, at least.
STREAM_EVERY = 8
SMALLEST_BUCKET = 32
# Of a prompt that has room to grow: tokens run at a time, at least, and in how many parts at most.
SMALLEST_PART, MOST_PARTS = 64, 16
NEW_TOKENS = 128


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = NEW_TOKENS,
    sampler: Sample = GREEDY,
    seed: int | Sequence[int] = 0,
    on_tokens: Callable[[list[list[int]]], None] | None = None,
    implementation: str | None = None,
    hold: bool = True,
) -> list[list[int]]:
    """Continue each prompt; the prompt runs dense, every new token by the model's rules, if it has any.

    Prompts, batch and cache are padded to powers of two, so that another prompt of the same bucket compiles nothing,
    and neither does another sampler, seed or number of tokens.

    Args:
        model: a dense or sparse model.
        prompts: token ids; an empty prompt stands for BOS alone.
        max_new_tokens: at most so many tokens are chosen, 0 or more.
        sampler: greedy by default.
        seed: row b draws from the seed and b alone, whatever the other rows are; of several, one a prompt, each row
            draws from its own alone, as the only prompt with that seed would.
        on_tokens: called with the new tokens of each row every few tokens, as they come.
        implementation: of the decode step, "triton", "mosaic", "xla" or None: see `decode_implementation`.
        hold: keep what a model with a plan skips at the plan's target (`models.control`); False takes the plan's
            thresholds as they are.

    Returns:
        The new tokens of each prompt, without the end-of-sequence token that stopped it.

    Raises:
        WisparseError: a prompt that with its new tokens exceeds the context, an empty one for a model without BOS,
            token ids outside the vocabulary or something else than ids, a negative number of tokens, a seed that is
            none, an implementation that cannot run here, or logits that are not finite.
    """
    rows = check_request(model.config, prompts, max_new_tokens)
    out: list[list[int]] = [[] for _ in rows]
    every = None if on_tokens is None else STREAM_EVERY
    for new in token_stream(model, rows, max_new_tokens, sampler, seed, implementation, every, hold):
        for row, tokens in zip(out, new, strict=True):
            row.extend(tokens)
        if on_tokens is not None:
            on_tokens(new)
    return out


def token_stream(
    model: Model,
    prompts: Sequence[Sequence[int] | Int32[np.ndarray, " _"]],
    max_new_tokens: int,
    sampler: Sample = GREEDY,
    seed: int | Sequence[int] = 0,
    implementation: str | None = None,
    every: int | None = STREAM_EVERY,
    hold: bool = True,
    realised: list[float] | None = None,
    grows_to: int = 0,
    ends: Sequence[int] = (),
) -> Iterator[list[list[int]]]:
    """The new tokens of each prompt, piece by piece; whoever stops asking stops the model. See `generate`.

    Args:
        every: tokens of a piece, at least; None gives the first token and then all others.
        realised: if given, holds after every piece the share of the weights that each row has skipped so far, averaged
            over its sparse tokens; nothing where there are none.
        grows_to: tokens that the prompts of later calls may have without that anything is compiled for them.
        ends: tokens that end a row beside the model's own.
    """
    config = model.config
    rows = check_request(config, prompts, max_new_tokens)
    words = seed_words(seed, len(rows))
    if not rows or max_new_tokens == 0:
        return
    length, part = _bucket(max(grows_to, *map(len, rows)), config.context), None
    if grows_to:
        part = max(SMALLEST_PART, -(-length // MOST_PARTS))
        length = -(-length // part) * part
    params, rules = model.params, model.rules
    mesh = mesh_of(params)
    # Whole sequences for every part of a mesh's data axis.
    batch = -(-_bucket(len(rows), None, smallest=1) // data_size(mesh)) * data_size(mesh)
    # Padding on the left shifts slots, not positions, so the cache may be longer than the context.
    room = _bucket(max_new_tokens, config.context)
    padded, begin = np.zeros((batch, length), np.int32), np.full(batch, length - 1, np.int32)
    for b, row in enumerate(rows):
        padded[b, length - len(row) :], begin[b] = row, length - len(row)
    start = spread(mesh, begin)
    seeds = spread(mesh, np.concatenate([words, np.zeros((batch - len(rows), 3), np.uint32)]))
    # Only NumPy and transfers between the compiled calls: an eager operation would compile anew for every new shape.
    ends = tuple(dict.fromkeys((*config.eos_token_ids, *ends)))
    stops = jnp.asarray(np.asarray(ends or (-2,), np.int32))
    values, real = sampler.values(config.vocab_size), jnp.asarray(np.arange(batch) < len(rows))

    chosen = decode_implementation(config, params, rules, batch, implementation)
    prompt = params, spread(mesh, padded), start, values, seeds, stops, real
    state = prefill(config, length + room, room, *prompt, part=part)
    if (plan := getattr(model, "plan", None)) is not None:
        state = state._replace(control=Control.start(plan.target, hold, batch, mesh))
    at = 0
    while True:
        # Read before the state is handed on: the next call takes its memory.
        done, finished = int(state.step), bool(on_host(state.finished).all())
        block = on_host(state.tokens)[: len(rows), at:done]
        if realised is not None and state.control is not None and done > 1:
            skipped, counted = on_host(state.control.skipped), on_host(state.control.tokens)
            realised[:] = [float(s / n) for s, n in zip(skipped[: len(rows)], counted, strict=False) if n]
        if (block == NOT_FINITE).any():
            raise WisparseError("the logits are not finite: the model's activations overflow on this prompt")
        yield [[int(t) for t in row if t >= 0 and int(t) not in ends] for row in block]
        at = done
        if at >= max_new_tokens or finished:
            return
        until = max_new_tokens if every is None else min(max_new_tokens, at + max(every, tokens_together()))
        state = decode(config, params, state, jnp.int32(until), start, values, stops, rules, chosen, mesh)


def check_request(config: LlamaConfig, prompts: Any, max_new_tokens: Any) -> list[Int32[np.ndarray, " _"]]:
    """The prompts as `generate` runs them; refuses what it refuses, and needs no weights for that.

    Raises:
        WisparseError: see `generate`.
    """
    check_count(max_new_tokens, "max-new-tokens", least=0)
    if isinstance(prompts, str | bytes):
        raise WisparseError("prompts: expected lists of token ids, found text; a tokenizer's encode gives its ids")
    try:
        rows = list(prompts)
    except TypeError:
        raise WisparseError(f"prompts: expected lists of token ids, found {type(prompts).__name__}") from None
    names = ["the prompt"] if len(rows) == 1 else [f"prompt {b}" for b in range(len(rows))]
    return [_checked(config, prompt, name, max_new_tokens) for name, prompt in zip(names, rows, strict=True)]


def _checked(config: LlamaConfig, ids: Any, name: str, new: int) -> Int32[np.ndarray, " length"]:
    prompt = token_row(ids, config.vocab_size, name)
    if not len(prompt):
        if not config.bos_token_ids:
            raise WisparseError(f"{name} is empty, and the model has no beginning-of-sequence token to start from")
        prompt = np.asarray([config.bos_token_ids[0]], np.int32)
    if len(prompt) + new > config.context:
        raise WisparseError(
            f"{name} has {len(prompt)} tokens; with {new} new ones it exceeds the context of {config.context}"
        )
    return prompt


def _bucket(size: int, largest: int | None, smallest: int = SMALLEST_BUCKET) -> int:
    """The next power of two, from `smallest` to `largest`."""
    bucket = max(smallest, 1 << (size - 1).bit_length())
    return bucket if largest is None else min(bucket, largest)
