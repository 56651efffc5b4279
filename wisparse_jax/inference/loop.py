"""The token loop: dense prefill, then tokens one by one inside one compiled `lax.while_loop`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Key, UInt32

from wisparse_jax.inference.sampling import SamplingValues, also_seen, choose, penalised, seen_in
from wisparse_jax.inference.steps import kernel_step, masked_step
from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.control import Control
from wisparse_jax.models.decode import group_thresholds, kernel_token_logits, zero_thresholds
from wisparse_jax.models.formats import block_format
from wisparse_jax.models.forward import Cache, Params, empty_cache, head, hidden_states, layout, token_logits
from wisparse_jax.models.keys import row_keys
from wisparse_jax.models.mesh_decode import mesh_token_logits
from wisparse_jax.models.rules import Rules, merge_biases, thresholds_of


class LoopState(NamedTuple):
    """What the loop carries from token to token."""

    step: Int[Array, ""]  # tokens chosen so far
    slot: Int[Array, ""]  # the cache slot that the next token takes
    tokens: Int[Array, "batch room"]  # the chosen tokens, -1 where there is none
    last: Int[Array, " batch"]  # the newest token of each row
    finished: Bool[Array, " batch"]  # rows that chose an end-of-sequence token
    keys: Key[Array, " batch"]  # each row's own randomness
    cache: Cache
    seen: Bool[Array, "batch vocab"]  # tokens of the row's prompt and those chosen, for the repetition penalty
    control: Control | None = None  # of a model that skips


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames="part")
def prefill(
    config: LlamaConfig,
    slots: int,
    room: int,
    params: Params,
    prompts: Int[Array, "batch length"],
    start: Int[Array, " batch"],
    values: SamplingValues,
    seeds: UInt32[Array, "batch words"],  # of `seed_words`
    stops: Int[Array, " stops"],
    real: Bool[Array, " batch"],
    part: int | None = None,
) -> LoopState:
    """Run the left-padded prompts densely and choose each row's first token; rows that only pad the batch are over.

    `part`, of which the length is a multiple, runs so many tokens at a time, and none that all rows have as padding:
    then a short prompt takes little time in a program for long ones.
    """
    batch, length = prompts.shape
    part = length if part is None else part
    cache = empty_cache(config, batch, slots, params["embed"].dtype)

    def run(i: Int[Array, ""] | int, carried: tuple[Any, Cache]) -> tuple[Any, Cache]:
        tokens, where = (
            lax.dynamic_slice_in_dim(prompts, i * part, part, 1),
            layout(config, batch, part, i * part, start),
        )
        hidden, cache = hidden_states(config, params, tokens, where, carried[1])
        return hidden[:, -1], cache

    if part == length:
        last, cache = run(0, (None, cache))
    else:
        nothing = jnp.zeros((batch, config.hidden_size), params["embed"].dtype)
        last, cache = lax.fori_loop(jnp.min(start) // part, length // part, run, (nothing, cache))
    keys, seen = row_keys(seeds), seen_in(prompts, start, config.vocab_size)
    first = choose(penalised(head(params, last), seen, values), values, _step_keys(keys, 0))
    tokens = jnp.full((batch, room), -1, jnp.int32).at[:, 0].set(first)
    finished = jnp.isin(first, stops) | ~real
    return LoopState(jnp.int32(1), jnp.int32(length), tokens, first, finished, keys, cache, also_seen(seen, first))


@functools.partial(jax.jit, static_argnums=(0, 8, 9), donate_argnums=2)
def decode(
    config: LlamaConfig,
    params: Params,
    state: LoopState,
    until: Int[Array, ""],
    start: Int[Array, " batch"],
    values: SamplingValues,
    stops: Int[Array, " stops"],
    rules: Rules | None,
    implementation: str = "xla",
    mesh: Mesh | None = None,
) -> LoopState:
    """Choose tokens until there are `until` of them or every row is finished; see `decode_implementation`.

    `mesh` is the one that the weights lie on, which the kernels have to know.
    """
    if implementation in ("triton", "mosaic"):
        planes = len(block_format(params).planes)
        if rules is None:
            # Zeros that XLA does not know, as it would make those anew in every turn of the loop.
            stacked = lax.optimization_barrier(zero_thresholds(config, planes))
        else:
            # Once, before the loop: the thresholds stacked, and biases added, since all its positions are sparse.
            params = merge_biases(params, rules)
            stacked = group_thresholds(thresholds_of(rules), planes)
        if state.control is None:
            kernels = kernel_token_logits if mesh is None else functools.partial(mesh_token_logits, mesh=mesh)
            how = {"thresholds": stacked, "implementation": implementation}
            step = functools.partial(kernels, config, params, **how)
        else:
            step = kernel_step(config, params, stacked, mesh, implementation=implementation)
    elif rules is None or state.control is None:
        step = functools.partial(token_logits, config, params, rules=rules)
    else:
        step = masked_step(config, params, rules)
    return token_loop(step, state, until, start, values, stops)


def token_loop(
    next_logits: Callable[..., Any],
    state: LoopState,
    until: Int[Array, ""],
    start: Int[Array, " batch"],
    values: SamplingValues,
    stops: Int[Array, " stops"],
    together: int | None = None,
) -> LoopState:
    """The loop of `decode` around any step of one token; to be called inside a jit.

    Args:
        next_logits: `NextLogits`, or `ControlledLogits` where the state has a control.
        together: tokens between two looks at whether to go on; None is `tokens_together()`. The tokens are the same;
            after the last row has finished, up to so many steps less one choose nothing.
    """

    def going(state: LoopState) -> Bool[Array, ""]:
        return (state.step < until) & ~jnp.all(state.finished)

    def step(state: LoopState) -> LoopState:
        place, control = (state.last, state.slot, start, state.cache), state.control
        if control is None:
            logits, cache = next_logits(*place)
        else:
            logits, cache, skipped = next_logits(*place, control.factors)
            control = control.after(skipped, ~state.finished)
        chosen = choose(penalised(logits, state.seen, values), values, _step_keys(state.keys, state.step))
        chosen = jnp.where(state.finished, -1, chosen)
        tokens = lax.dynamic_update_slice(state.tokens, chosen[:, None], (0, state.step))
        finished = state.finished | jnp.isin(chosen, stops)
        last = jnp.maximum(chosen, 0)
        seen = also_seen(state.seen, last)
        return LoopState(state.step + 1, state.slot + 1, tokens, last, finished, state.keys, cache, seen, control)

    together = tokens_together() if together is None else together

    def steps(state: LoopState) -> LoopState:
        return lax.fori_loop(0, together, lambda _, state: step(state), state)

    if together > 1:
        state = lax.while_loop(lambda state: going(state) & (state.step + together <= until), steps, state)
    return lax.while_loop(going, step, state)


def tokens_together() -> int:
    """Tokens between two looks at whether to go on.

    On a GPU the host looks at a loop's condition before each turn, and nothing runs meanwhile; a loop of a fixed number
    of turns has none.
    """
    return 16 if jax.default_backend() == "gpu" else 1


def _step_keys(keys: Key[Array, " batch"], step: Int[Array, ""] | int) -> Key[Array, " batch"]:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)
