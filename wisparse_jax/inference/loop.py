"""The token loop: dense prefill, then tokens one by one inside one compiled `lax.while_loop`.

The step of one token is `hidden_states` with a cache, dense or by rules, or for a sparse model the kernels'
step, which takes the same arguments and gives the same logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from kernels_pallas.implementation import choose as choose_kernels
from kernels_pallas.implementation import mosaic_problem
from kernels_pallas.kept import LARGEST_BATCH
from kernels_pallas.tuned import largest_batch
from wisparse_jax.errors import WisparseError
from wisparse_jax.inference.sampling import SamplingValues, choose
from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.decode import (
    fused_step_problem,
    group_thresholds,
    kernel_token_logits,
    zero_thresholds,
)
from wisparse_jax.models.forward import Cache, Params, empty_cache, head, hidden_states, layout
from wisparse_jax.models.mesh import data_size, mesh_of
from wisparse_jax.models.mesh_decode import mesh_token_logits
from wisparse_jax.models.rules import Rules, merge_biases, thresholds_of

# The newest tokens, their slot, where rows start and the cache in; logits and the cache with the tokens out.
NextLogits = Callable[
    [Int[Array, " batch"], Int[Array, ""], Int[Array, " batch"], Cache], tuple[Float[Array, "batch vocab"], Cache]
]


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


def decode_implementation(
    config: LlamaConfig,
    params: Params | None,
    rules: Rules | None,
    batch: int,
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> str:
    """What `decode` runs.

    "mosaic": the kernels, several decoder blocks in one launch of a Mosaic kernel, also for a dense model; "triton":
    the sparse kernels as launches of their own, by Triton; "xla": dense or masked-dense products.

    Args:
        config: of the model.
        params: its weights; None before they are read: whether the Mosaic kernel can run them is left open then.
        rules: of a sparse model, None for a dense one.
        batch: sequences.
        implementation: a choice by name; None takes the kernels on an NVIDIA GPU for as many sequences as they were
            measured to be faster for (`largest_batch`), the Mosaic kernel if it can run the model. On a mesh it never
            can, and sequences are those of a device.
        mesh: that the weights will lie on, before there are any.

    Raises:
        WisparseError: the named one cannot run: the reason is in the message.
    """
    mesh = mesh_of(params) if mesh is None and params is not None else mesh
    if mesh is not None and implementation == "mosaic":
        raise WisparseError(
            "implementation = 'mosaic' runs whole blocks in one launch, which a mesh cannot split: expected triton "
            "or xla"
        )
    batch = -(-batch // data_size(mesh))
    try:
        chosen = choose_kernels(implementation, offered=("triton", "mosaic", "xla"))
    except ValueError as error:
        raise WisparseError(str(error)) from None
    if implementation in ("triton", "mosaic"):
        if rules is None and implementation == "triton":
            raise WisparseError("implementation = 'triton' runs sparse models only; this one is dense")
        if batch > LARGEST_BATCH:
            raise WisparseError(
                f"implementation = {implementation!r} takes at most {LARGEST_BATCH} sequences, found {batch}"
            )
        known = params if implementation == "mosaic" else None
        problem = None if known is None else fused_step_problem(config, known, batch)
        if problem is not None:
            raise WisparseError(f"implementation = 'mosaic' {problem}")
        return chosen
    if chosen == "xla":
        return "xla"
    fused = mesh is None and batch <= largest_batch("mosaic") and mosaic_problem() is None
    if fused and (params is None or fused_step_problem(config, params, batch) is None):
        return "mosaic"
    return "triton" if rules is not None and batch <= largest_batch("triton") else "xla"


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
        if rules is None:
            # Zeros that XLA does not know, as it would make those anew in every turn of the loop.
            stacked = lax.optimization_barrier(zero_thresholds(config))
        else:
            # Once, before the loop: the thresholds stacked, and biases added, since all its positions are sparse.
            params = merge_biases(params, rules)
            stacked = group_thresholds(thresholds_of(rules))
        how = {"thresholds": stacked, "implementation": implementation}
        kernels = kernel_token_logits if mesh is None else functools.partial(mesh_token_logits, mesh=mesh)
        next_logits = functools.partial(kernels, **how)
    else:
        next_logits = functools.partial(token_logits, rules=rules)

    return token_loop(lambda *token: next_logits(config, params, *token), state, until, start, values, stops)


def token_loop(
    next_logits: NextLogits,
    state: LoopState,
    until: Int[Array, ""],
    start: Int[Array, " batch"],
    values: SamplingValues,
    stops: Int[Array, " stops"],
    together: int | None = None,
) -> LoopState:
    """The loop of `decode` around any step of one token; to be called inside a jit.

    Args:
        together: tokens between two looks at whether to go on; None is `tokens_together()`. The tokens are the same;
            after the last row has finished, up to so many steps less one choose nothing.
    """

    def going(state: LoopState) -> Bool[Array, ""]:
        return (state.step < until) & ~jnp.all(state.finished)

    def step(state: LoopState) -> LoopState:
        logits, cache = next_logits(state.last, state.slot, start, state.cache)
        chosen = choose(logits, values, _step_keys(state.keys, state.step))
        chosen = jnp.where(state.finished, -1, chosen)
        tokens = lax.dynamic_update_slice(state.tokens, chosen[:, None], (0, state.step))
        finished = state.finished | jnp.isin(chosen, stops)
        return LoopState(state.step + 1, state.slot + 1, tokens, jnp.maximum(chosen, 0), finished, state.keys, cache)

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


def token_logits(
    config: LlamaConfig,
    params: Params,
    tokens: Int[Array, " batch"],
    slot: Int[Array, ""],
    start: Int[Array, " batch"],
    cache: Cache,
    rules: Rules | None,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """The logits after one more token a row, and the cache with it."""
    where = layout(config, len(tokens), 1, slot, start)
    hidden, cache = hidden_states(config, params, tokens[:, None], where, cache, rules)
    return head(params, hidden[:, 0]), cache


def _step_keys(keys: Key[Array, " batch"], step: Int[Array, ""] | int) -> Key[Array, " batch"]:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)
