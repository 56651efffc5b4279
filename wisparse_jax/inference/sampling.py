"""How the next token is chosen from the logits."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from wisparse_jax.arguments import check_count, check_share
from wisparse_jax.errors import WisparseError


class SamplingValues(NamedTuple):
    """A sampler as arrays, so that another temperature compiles nothing."""

    temperature: Float[Array, ""]  # 0 is greedy
    top_k: Int[Array, ""]  # the vocabulary's size keeps all
    top_p: Float[Array, ""]  # 1 keeps all
    min_p: Float[Array, ""]  # 0 keeps all
    repetition_penalty: Float[Array, ""]  # 1 is none


@dataclasses.dataclass(frozen=True)
class Sample:
    """Sampling from the softmax at a temperature, cut to the `top_k` most likely tokens and then to the nucleus.

    The nucleus is the smallest set of most likely tokens whose probability reaches `top_p`; it holds at least one.
    `min_p` leaves those that are at least `min_p` times as likely as the most likely one. `repetition_penalty` divides
    the positive logits of all tokens that the prompt or the answer already holds, and multiplies the negative ones,
    before anything else, also where the choice is greedy. All are what transformers means by these names.

    Raises:
        WisparseError: a negative or non-finite temperature, top_k below 1, top_p outside (0, 1], min_p outside [0, 1],
            or a repetition penalty outside [0.001, 1000], beyond which logits would not stay finite.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise WisparseError(f"temperature = {self.temperature!r}: expected a finite number, 0 or above")
        if not _is_number(self.repetition_penalty) or not 1e-3 <= self.repetition_penalty <= 1e3:
            raise WisparseError(
                f"repetition-penalty = {self.repetition_penalty!r}: expected a number from 0.001 to 1000"
            )
        if self.top_k is not None:
            check_count(self.top_k, "top-k", least=1)
        check_share(self.top_p, "top-p")
        check_share(self.min_p, "min-p", least="0 or above")

    def values(self, vocab_size: int) -> SamplingValues:
        """The settings as arrays, so that other values compile nothing anew."""
        top_k = vocab_size if self.top_k is None else min(self.top_k, vocab_size)
        rest = map(jnp.float32, (self.top_p, self.min_p, self.repetition_penalty))
        return SamplingValues(jnp.float32(self.temperature), jnp.int32(top_k), *rest)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


GREEDY = Sample(temperature=0.0)
NOT_FINITE = -3  # in place of a token where the largest logit is no number


def seen_in(
    prompts: Int[Array, "batch length"], start: Int[Array, " batch"], vocab_size: int
) -> Bool[Array, "batch vocab"]:
    """Which tokens stand in each left-padded prompt, behind its padding."""
    batch, length = prompts.shape
    real = jnp.arange(length)[None] >= start[:, None]
    return jnp.zeros((batch, vocab_size), bool).at[jnp.arange(batch)[:, None], prompts].max(real)


def also_seen(seen: Bool[Array, "batch vocab"], tokens: Int[Array, " batch"]) -> Bool[Array, "batch vocab"]:
    """`seen`, and of each row the token that it has now."""
    return seen.at[jnp.arange(len(tokens)), tokens].set(True)


def penalised(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], values: SamplingValues
) -> Float[Array, "batch vocab"]:
    """The logits, with those of tokens that a row has seen made less likely by the repetition penalty."""
    penalty = values.repetition_penalty
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


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
        # The first is the most likely one.
        likely = (before < values.top_p) & (shares >= values.min_p * shares[:, :1])
        kept = jnp.where(in_top & likely, ranked, -jnp.inf)
        rank = jax.vmap(jax.random.categorical)(keys, kept)
        return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]

    chosen = jax.lax.cond(values.temperature == 0, lambda: best, sampled).astype(jnp.int32)
    # NaN counts as the largest, so that one look is enough.
    largest = jnp.take_along_axis(logits, best[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.isfinite(largest), chosen, NOT_FINITE)
