"""The two losses of the searches, each one compiled program over vectors of candidates.

A candidate is exponents and thresholds, numbers alone, so no candidate compiles anything. Candidates run `chunk` at a
time and windows one at a time, which bounds the memory by `chunk` windows of activations. What candidates of a block
have in common before its o projection is computed once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float64, Int

from wisparse_jax.models.config import INPUT_GROUPS, LlamaConfig
from wisparse_jax.models.forward import (
    BlockCache,
    Cache,
    Layout,
    Params,
    after_attention,
    head,
    hidden_states,
    layout,
    self_attention,
)
from wisparse_jax.search.calibration import Calibration
from wisparse_jax.sparsity.score import BlockNorms, block_thresholds

# Exponents, taus and the like of every candidate, `[chunks, chunk, ...]` each.
Candidates = tuple[Array, ...]
_BEFORE_ATTENTION = len(INPUT_GROUPS["attn_in"])  # of a block's layers, q, k and v: the first ones
# Exponents and thresholds of candidates for one block in, each candidate's error out.
BlockObjective = Callable[
    [Float64[np.ndarray, "candidates 7"], Float64[np.ndarray, "candidates 7"]], Float64[np.ndarray, " candidates"]
]


def kl_divergence(dense: Float[Array, "*batch vocab"], sparse: Float[Array, "*batch vocab"]) -> Float[Array, "*batch"]:
    """`KL(softmax(dense) || softmax(sparse))` in nats, from logits."""
    p, q = jax.nn.log_softmax(dense), jax.nn.log_softmax(sparse)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


class BlockLoss:
    """Mean squared error of one block's output on its dense inputs, for many candidates at once."""

    def __init__(self, calibration: Calibration, index: int, sparse_tokens: int, chunk: int):
        n = calibration.windows_for(sparse_tokens)
        self._static = (calibration.config, calibration.config.windows[index], calibration.dense_positions)
        self._chunk = chunk
        self._arrays = (
            calibration.params["blocks"][index],
            calibration.norms[index],
            calibration.inputs[index][:n],
            calibration.inputs[index + 1][:n],
            jax.tree.map(lambda a: a[:n], calibration.caches[index]),
        )

    def __call__(
        self, exponents: Float64[np.ndarray, "candidates 7"], taus: Float64[np.ndarray, "candidates 7"]
    ) -> Float64[np.ndarray, " candidates"]:
        """The loss of each candidate."""
        before = np.concatenate([table[:, :_BEFORE_ATTENTION] for table in (exponents, taus)], axis=1)
        _, rows, attention = np.unique(before, axis=0, return_index=True, return_inverse=True)
        # A power of two of them, so that few different numbers are compiled for.
        rows = np.resize(rows, min(1 << (len(rows) - 1).bit_length(), len(taus)))
        distinct = _padded(self._chunk, exponents[rows], taus[rows])
        candidates = _padded(self._chunk, exponents, taus, attention.reshape(-1))
        loss = _block_losses(*self._static, *self._arrays, distinct, candidates)
        return np.asarray(loss, np.float64)[: len(taus)]


class DivergenceLoss:
    """Mean over tokens of KL(dense || sparse) of the whole model, for many candidates at once."""

    def __init__(self, calibration: Calibration, sparse_tokens: int, chunk: int):
        n = calibration.windows_for(sparse_tokens)
        self._static = (calibration.config, calibration.dense_positions)
        self._chunk = chunk
        self._arrays = (
            calibration.params,
            calibration.norms,
            calibration.tokens[:n],
            calibration.hidden[:n],
            jax.tree.map(lambda a: a[:n], calibration.caches),
        )

    def __call__(
        self,
        exponents: Float64[np.ndarray, "blocks 7"],
        taus: Float64[np.ndarray, "candidates blocks 7"],
    ) -> Float64[np.ndarray, " candidates"]:
        """The divergence of each candidate, nats per token; all share the exponents."""
        candidates = _padded(self._chunk, np.broadcast_to(exponents, taus.shape), taus)
        loss = _divergences(*self._static, *self._arrays, candidates)
        return np.asarray(loss, np.float64)[: len(taus)]


def _padded(chunk: int, *tables: np.ndarray) -> Candidates:
    """The tables in 32 bits as `[chunks, at most chunk, ...]`, evenly filled; the last candidate fills up."""
    count = len(tables[0])
    chunk = -(-count // -(-count // chunk))
    rows = np.minimum(np.arange(-(-count // chunk) * chunk), count - 1)
    types = {"f": jnp.float32, "i": jnp.int32}
    return tuple(jnp.asarray(t[rows], types[t.dtype.kind]).reshape(-1, chunk, *t.shape[1:]) for t in tables)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _block_losses(
    config: LlamaConfig,
    window: int | None,
    first: int,
    params: Params,
    norms: BlockNorms,
    inputs: Float[Array, "windows positions hidden"],
    targets: Float[Array, "windows positions hidden"],
    cache: BlockCache,
    distinct: Candidates,
    candidates: Candidates,
) -> Float[Array, " candidates"]:
    """The candidates are exponents, taus, and which of the `distinct` ones is the same before the o projection."""
    where = layout(config, 1, inputs.shape[1], first)

    def losses(x: Array, target: Array, kv: BlockCache) -> Array:
        def before(alpha: Array, tau: Array) -> Array:
            return self_attention(
                config, window, params, x[None], where, _row(kv), block_thresholds(norms, alpha, tau)
            )[0]

        attention = _each(before, distinct)

        def after(alpha: Array, tau: Array, which: Array) -> Array:
            out = after_attention(config, params, x[None], attention[which], block_thresholds(norms, alpha, tau))
            return jnp.sum(jnp.square((out[0] - target).astype(jnp.float32)))

        return _each(after, candidates)

    return _mean_over_windows(losses, (inputs, targets, cache)) / inputs[0].size


@functools.partial(jax.jit, static_argnums=(0, 1))
def _divergences(
    config: LlamaConfig,
    first: int,
    params: Params,
    norms: list[BlockNorms],
    tokens: Int[Array, "windows positions"],
    hidden: Float[Array, "windows positions hidden"],
    caches: Cache,
    candidates: Candidates,
) -> Float[Array, " candidates"]:
    where: Layout = layout(config, 1, tokens.shape[1], first)

    def losses(ids: Array, dense: Array, kv: Cache) -> Array:
        def one(alpha: Array, tau: Array) -> Array:
            thresholds = [block_thresholds(block_norms, alpha[b], tau[b]) for b, block_norms in enumerate(norms)]
            out, _ = hidden_states(config, params, ids[None], where, [_row(c) for c in kv], thresholds)
            return jnp.mean(kl_divergence(head(params, dense), head(params, out[0])))

        return _each(one, candidates)

    return _mean_over_windows(losses, (tokens, hidden, caches))


def _row(cache: BlockCache) -> BlockCache:
    return BlockCache(cache.keys[None], cache.values[None])


def _each(one: Callable[..., Array], candidates: Candidates) -> Float[Array, "candidates ..."]:
    """`one(*candidate)` of every candidate, a chunk at a time."""
    out = lax.map(lambda chunk: jax.vmap(one)(*chunk), candidates)
    return out.reshape(-1, *out.shape[2:])


def _mean_over_windows(losses: Callable[..., Array], windows: tuple) -> Float[Array, " candidates"]:
    """The mean over windows of `losses(*window)`, of all candidates."""
    return jnp.mean(lax.map(lambda window: losses(*window), windows), axis=0)
