"""How far the predictions of two models are apart, and how well one predicts a text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wisparse_jax.models.forward import Params, head


def kl_divergence(dense: Float[Array, "*batch vocab"], sparse: Float[Array, "*batch vocab"]) -> Float[Array, "*batch"]:
    """`KL(softmax(dense) || softmax(sparse))` in nats, from logits."""
    p, q = jax.nn.log_softmax(dense), jax.nn.log_softmax(sparse)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def kl_of_states(
    params: Params, dense: Float[Array, "*batch hidden"], sparse: Float[Array, "*batch hidden"]
) -> Float[Array, "*batch"]:
    """`KL(dense || sparse)` in nats of what one head predicts from final, normed states; `params` hold the head."""
    return kl_divergence(head(params, dense), head(params, sparse))


def negative_log_likelihood(
    logits: Float[Array, "*batch vocab"], targets: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """`-log p(target)` in nats, from logits."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
