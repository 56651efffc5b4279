"""Text that the dense model writes itself, for calibration without data."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Int32, Key

from wisparse_jax.bars import bar
from wisparse_jax.errors import WisparseError
from wisparse_jax.inference.openers import NONE, Openers
from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.forward import Params, empty_cache, token_logits
from wisparse_jax.models.keys import random_key
from wisparse_jax.models.mesh import mesh_of, on_host, spread
from wisparse_jax.models.model import Model


def sample_windows(
    model: Model,
    windows: int,
    length: int,
    seed: int,
    batch: int = 32,
    progress: bool = False,
    openers: Openers = NONE,
) -> Int32[np.ndarray, "windows length"]:
    """Windows of documents that the dense model samples at temperature 1, one after another.

    A window starts with BOS; with EOS where the model has no BOS, as EOS is what stands between documents then; and
    with a random token where it has neither. BOS follows EOS, where they differ. Documents are never empty: an EOS is
    not sampled straight after the token that a document starts from. Where BOS and EOS are one token, it separates the
    documents. Window w depends on the seed and w alone.

    With openers a document goes on from one of them: window w's first from opener w, each later one from the next. The
    end of a document is not sampled straight after its opener.

    Raises:
        WisparseError: no windows, windows beyond the model's context, or a seed that is none.
    """
    config = model.config
    if windows < 1 or not 2 <= length <= config.context:
        raise WisparseError(
            f"expected at least 1 window of 2 to {config.context} tokens, found {windows} of {length} tokens"
        )
    batch = min(batch, windows)
    root, params, parts = random_key(seed), model.params, []
    for at in bar(range(0, windows, batch), desc="sampling text", disable=not progress, leave=False):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(root, jnp.arange(at, at + batch))
        numbers = np.arange(at, at + batch, dtype=np.int32)
        given = spread(mesh_of(params), keys), spread(mesh_of(params), numbers)
        parts.append(on_host(_write(config, length, params, *given, jnp.asarray(openers.tokens))))
    return np.concatenate(parts)[:windows].astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _write(
    config: LlamaConfig,
    length: int,
    params: Params,
    keys: Key[Array, " batch"],
    numbers: Int[Array, " batch"],
    openers: Int[Array, "openers longest"],
) -> Int[Array, "batch length"]:
    batch = len(keys)
    step_keys = jax.vmap(lambda key: jax.random.split(key, length))(keys)
    # Without a BOS, an EOS is what a document comes after.
    begins = config.bos_token_ids or config.eos_token_ids
    if begins:
        first = jnp.full(batch, begins[0], jnp.int32)
    else:
        first = jax.vmap(lambda key: jax.random.randint(key, (), 0, config.vocab_size))(step_keys[:, 0])
    ends = _members(config, config.eos_token_ids)
    # A separator that is both starts the next document itself.
    closes = ends & ~_members(config, begins)
    start, sizes = jnp.zeros(batch, jnp.int32), jnp.sum(openers >= 0, axis=1, dtype=jnp.int32)

    def step(slot, carry):
        # `read`: tokens of the document so far; `ended`: the last token was sampled and closed a document.
        tokens, last, cache, document, read, ended = carry
        logits, cache = token_logits(config, params, last, slot, start, cache, None)
        which = document % len(sizes)
        size = sizes[which]
        empty = (read == size) | _members(config, begins)[last]
        logits = jnp.where(empty[:, None] & ends[None], -jnp.inf, logits)
        chosen = jax.vmap(jax.random.categorical)(step_keys[:, slot + 1], logits).astype(jnp.int32)
        if longest := openers.shape[1]:
            chosen = jnp.where(read < size, openers[which, jnp.minimum(read, longest - 1)], chosen)
        closing = ended & closes[last]
        if begins:
            chosen = jnp.where(closing, begins[0], chosen)
        ended = ~closing & (read >= size) & ends[chosen]
        read = jnp.where(closing | ended, 0, read + 1)
        tokens = lax.dynamic_update_slice(tokens, chosen[:, None], (0, slot + 1))
        return tokens, chosen, cache, document + ended.astype(jnp.int32), read, ended

    tokens = jnp.zeros((batch, length), jnp.int32).at[:, 0].set(first)
    cache = empty_cache(config, batch, length, params["embed"].dtype)
    carry = tokens, first, cache, numbers, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool)
    return lax.fori_loop(0, length - 1, step, carry)[0]


def _members(config: LlamaConfig, ids: tuple[int, ...]) -> Bool[Array, " vocab"]:
    """Which tokens of the vocabulary are among the ids."""
    return jnp.asarray(np.isin(np.arange(config.vocab_size), ids))
