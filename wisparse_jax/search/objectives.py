"""The two losses of the searches, each one compiled program over vectors of candidates.

A candidate is exponents and thresholds, numbers alone, so no candidate compiles anything. Candidates run `chunk` at a
time and windows one at a time, which bounds the memory by `chunk` windows of activations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float64, Int

from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.forward import BlockCache, Cache, Layout, Params, block, head, hidden_states, layout
from wisparse_jax.search.calibration import Calibration
from wisparse_jax.sparsity.score import BlockNorms, block_thresholds

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
        alphas, taus_, count = _padded(self._chunk, exponents, taus)
        loss = _block_losses(*self._static, *self._arrays, alphas, taus_)
        return np.asarray(loss, np.float64)[:count]


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
        alphas = np.broadcast_to(exponents, taus.shape)
        alphas, taus_, count = _padded(self._chunk, alphas, taus)
        loss = _divergences(*self._static, *self._arrays, alphas, taus_)
        return np.asarray(loss, np.float64)[:count]


def _padded(chunk: int, *tables: np.ndarray) -> tuple[Array, Array, int]:
    """The tables in float32 as `[chunks, at most chunk, ...]`, evenly filled; the last candidate fills up."""
    count = len(tables[0])
    chunk = -(-count // -(-count // chunk))
    rows = np.minimum(np.arange(-(-count // chunk) * chunk), count - 1)
    first, second = (jnp.asarray(t[rows], jnp.float32).reshape(-1, chunk, *t.shape[1:]) for t in tables)
    return first, second, count


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
    exponents: Float[Array, "chunks chunk 7"],
    taus: Float[Array, "chunks chunk 7"],
) -> Float[Array, " candidates"]:
    where = layout(config, 1, inputs.shape[1], first)

    def one(alpha: Array, tau: Array, x: Array, target: Array, kv: BlockCache) -> Array:
        out, _ = block(config, window, params, x[None], where, _row(kv), block_thresholds(norms, alpha, tau))
        return jnp.sum(jnp.square((out[0] - target).astype(jnp.float32)))

    return _mean_over_windows(one, (exponents, taus), (inputs, targets, cache)) / inputs[0].size


@functools.partial(jax.jit, static_argnums=(0, 1))
def _divergences(
    config: LlamaConfig,
    first: int,
    params: Params,
    norms: list[BlockNorms],
    tokens: Int[Array, "windows positions"],
    hidden: Float[Array, "windows positions hidden"],
    caches: Cache,
    exponents: Float[Array, "chunks chunk blocks 7"],
    taus: Float[Array, "chunks chunk blocks 7"],
) -> Float[Array, " candidates"]:
    where: Layout = layout(config, 1, tokens.shape[1], first)

    def one(alpha: Array, tau: Array, ids: Array, dense: Array, kv: Cache) -> Array:
        thresholds = [block_thresholds(block_norms, alpha[b], tau[b]) for b, block_norms in enumerate(norms)]
        out, _ = hidden_states(config, params, ids[None], where, [_row(c) for c in kv], thresholds)
        return jnp.mean(kl_divergence(head(params, dense), head(params, out[0])))

    return _mean_over_windows(one, (exponents, taus), (tokens, hidden, caches))


def _row(cache: BlockCache) -> BlockCache:
    return BlockCache(cache.keys[None], cache.values[None])


def _mean_over_windows(one, candidates, windows) -> Float[Array, " candidates"]:
    """`one(*candidate, *window)`, vectorised over a chunk of candidates, averaged over windows."""
    count = len(windows[0])

    def chunk_loss(chunk: tuple[Array, ...]) -> Array:
        def step(total: Array, window: tuple) -> tuple[Array, None]:
            in_axes = (0,) * len(chunk) + (None,) * len(window)
            return total + jax.vmap(one, in_axes)(*chunk, *window), None

        return lax.scan(step, jnp.zeros(len(chunk[0]), jnp.float32), windows)[0] / count

    return lax.map(chunk_loss, candidates).reshape(-1)
