"""Windows scored token by token with the token loop's control, which has to see a token before the next."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.control import Control
from wisparse_jax.models.forward import Cache, Params, token_logits
from wisparse_jax.models.kl import kl_divergence, negative_log_likelihood
from wisparse_jax.models.rules import Rules, mean_skipped, scaled_rules


@functools.partial(jax.jit, static_argnums=(0, 1))
def held_scores(
    config: LlamaConfig,
    first: int,
    params: Params,
    ids: Int[Array, "batch length"],
    dense_logits: Float[Array, "batch positions vocab"],
    cache: Cache,
    rules: Rules,
    control: Control,
) -> tuple[
    Float[Array, " batch"], Float[Array, " batch"], Float[Array, "batch positions"], Float[Array, "batch blocks 7"]
]:
    """Per window: mean nll, mean KL, realised sparsity of each token and of each layer.

    Args:
        first: the first position that runs sparse.
        ids: the windows; their last position is only predicted.
        dense_logits: of the positions from `first` on.
        cache: of a dense run of the windows.
        rules: of the plan.
        control: a row a window, not yet begun.
    """
    batch, length = ids.shape
    start, running = jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool)

    def step(carry: tuple[Cache, Control], at: Array) -> tuple[tuple[Cache, Control], tuple[Array, ...]]:
        cache, control = carry
        tokens, targets = (lax.dynamic_index_in_dim(ids, at + n, axis=1, keepdims=False) for n in (0, 1))
        shares: list[Array] = []
        own = scaled_rules(rules, control.factors)
        logits, cache = token_logits(config, params, tokens, at, start, cache, own, shares)
        dense = lax.dynamic_index_in_dim(dense_logits, at - first, axis=1, keepdims=False)
        skipped = mean_skipped(config, shares[0])
        out = negative_log_likelihood(logits, targets), kl_divergence(dense, logits), skipped, shares[0]
        return (cache, control.after(skipped, running)), out

    _, (nll, kl, skipped, shares) = lax.scan(step, (cache, control), jnp.arange(first, length - 1))
    return nll.mean(axis=0), kl.mean(axis=0), skipped.T, shares.mean(axis=0)
