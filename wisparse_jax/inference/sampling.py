"""How the next token is chosen from the logits."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from wisparse_jax.arguments import check_count, check_share
from wisparse_jax.errors import WisparseError
from wisparse_jax.models.keys import random_key as random_key


class SamplingValues(NamedTuple):
    """A sampler as arrays, so that another temperature compiles nothing."""

    temperature: Float[Array, ""]  # 0 is greedy
    top_k: Int[Array, ""]  # the vocabulary's size keeps all
    top_p: Float[Array, ""]  # 1 keeps all


@dataclasses.dataclass(frozen=True)
class Sample:
    """Sampling from the softmax at a temperature, cut to the `top_k` most likely tokens and then to the nucleus.

    The nucleus is the smallest set of most likely tokens whose probability reaches `top_p`; it holds at least one.

    Raises:
        WisparseError: a negative or non-finite temperature, top_k below 1, or top_p outside (0, 1].
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Check every value."""
        number = isinstance(self.temperature, int | float) and not isinstance(self.temperature, bool)
        if not number or not 0 <= self.temperature < math.inf:
            raise WisparseError(f"temperature = {self.temperature!r}: expected a finite number, 0 or above")
        if self.top_k is not None:
            check_count(self.top_k, "top-k", least=1)
        check_share(self.top_p, "top-p")

    def values(self, vocab_size: int) -> SamplingValues:
        """The sampler as arrays."""
        top_k = vocab_size if self.top_k is None else min(self.top_k, vocab_size)
        return SamplingValues(jnp.float32(self.temperature), jnp.int32(top_k), jnp.float32(self.top_p))


GREEDY = Sample(temperature=0.0)
NOT_FINITE = -3  # in place of a token where the largest logit is no number


def choose(
    logits: Float[Array, "batch vocab"], values: SamplingValues, keys: Key[Array, " batch"]
) -> Int[Array, " batch"]:
    """One token per row, each row from its own key; `NOT_FINITE` where there is none to choose."""
    best = jnp.argmax(logits, axis=-1)

    def sampled() -> Array:
        scaled = logits / jnp.maximum(values.temperature, 1e-6)
        order = jnp.argsort(-scaled, axis=-1)
        ranked = jnp.take_along_axis(scaled, order, axis=-1)
        in_top = jnp.arange(logits.shape[-1])[None] < values.top_k
        shares = jax.nn.softmax(jnp.where(in_top, ranked, -jnp.inf), axis=-1)
        # A token stays while those before it have not reached top_p; the first always does.
        before = jnp.cumsum(shares, axis=-1) - shares
        kept = jnp.where(in_top & (before < values.top_p), ranked, -jnp.inf)
        rank = jax.vmap(jax.random.categorical)(keys, kept)
        return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]

    chosen = jax.lax.cond(values.temperature == 0, lambda: best, sampled).astype(jnp.int32)
    # NaN counts as the largest, so that one look is enough.
    largest = jnp.take_along_axis(logits, best[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.isfinite(largest), chosen, NOT_FINITE)
