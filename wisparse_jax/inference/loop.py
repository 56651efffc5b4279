"""The token loop: dense prefill, then tokens one by one inside one compiled `lax.while_loop`.

The step of one token is `hidden_states` with a cache, dense or with thresholds; whatever replaces it on a device with
kernels of its own keeps its arguments.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from wisparse_jax.inference.sampling import SamplingValues, choose
from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.forward import Cache, Params, Thresholds, empty_cache, head, hidden_states, layout


class LoopState(NamedTuple):
    """What the loop carries from token to token."""

    step: Int[Array, ""]  # tokens chosen so far
    slot: Int[Array, ""]  # the cache slot that the next token takes
    tokens: Int[Array, "batch room"]  # the chosen tokens, -1 where there is none
    last: Int[Array, " batch"]  # the newest token of each row
    finished: Bool[Array, " batch"]  # rows that chose an end-of-sequence token
    keys: Key[Array, " batch"]  # each row's own randomness
    cache: Cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def prefill(
    config: LlamaConfig,
    slots: int,
    room: int,
    params: Params,
    prompts: Int[Array, "batch length"],
    start: Int[Array, " batch"],
    values: SamplingValues,
    key: Key[Array, ""],
    stops: Int[Array, " stops"],
    real: Bool[Array, " batch"],
) -> LoopState:
    """Run the left-padded prompts densely and choose each row's first token; rows that only pad the batch are over."""
    batch, length = prompts.shape
    cache = empty_cache(config, batch, slots, params["embed"].dtype)
    hidden, cache = hidden_states(config, params, prompts, layout(config, batch, length, 0, start), cache)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    first = choose(head(params, hidden[:, -1]), values, _step_keys(keys, 0))
    tokens = jnp.full((batch, room), -1, jnp.int32).at[:, 0].set(first)
    return LoopState(jnp.int32(1), jnp.int32(length), tokens, first, jnp.isin(first, stops) | ~real, keys, cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    config: LlamaConfig,
    params: Params,
    state: LoopState,
    until: Int[Array, ""],
    start: Int[Array, " batch"],
    values: SamplingValues,
    stops: Int[Array, " stops"],
    thresholds: Thresholds | None,
) -> LoopState:
    """Choose tokens until there are `until` of them or every row is finished."""

    def going(state: LoopState) -> Bool[Array, ""]:
        return (state.step < until) & ~jnp.all(state.finished)

    def step(state: LoopState) -> LoopState:
        logits, cache = token_logits(config, params, state.last, state.slot, start, state.cache, thresholds)
        chosen = choose(logits, values, _step_keys(state.keys, state.step))
        chosen = jnp.where(state.finished, -1, chosen)
        tokens = lax.dynamic_update_slice(state.tokens, chosen[:, None], (0, state.step))
        finished = state.finished | jnp.isin(chosen, stops)
        return LoopState(state.step + 1, state.slot + 1, tokens, jnp.maximum(chosen, 0), finished, state.keys, cache)

    return lax.while_loop(going, step, state)


def token_logits(
    config: LlamaConfig,
    params: Params,
    tokens: Int[Array, " batch"],
    slot: Int[Array, ""],
    start: Int[Array, " batch"],
    cache: Cache,
    thresholds: Thresholds | None,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """The logits after one more token a row, and the cache with it."""
    where = layout(config, len(tokens), 1, slot, start)
    hidden, cache = hidden_states(config, params, tokens[:, None], where, cache, thresholds)
    return head(params, hidden[:, 0]), cache


def _step_keys(keys: Key[Array, " batch"], step: Int[Array, ""] | int) -> Key[Array, " batch"]:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)
