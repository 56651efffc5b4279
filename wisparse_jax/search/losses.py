"""The two losses of the searches, each one compiled program over vectors of candidates.

A candidate is exponents and thresholds, numbers alone, so no candidate compiles anything. Candidates run `chunk` at a
time and windows one at a time, which bounds the memory by `chunk` windows of activations. What candidates of a block
have in common before its o projection is computed once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float64, Int

from wisparse_jax.calibration.dense import Calibration
from wisparse_jax.calibration.settings import Settings, setting
from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import INPUT_GROUPS, LlamaConfig
from wisparse_jax.models.forward import (
    BlockCache,
    Cache,
    Layout,
    Params,
    after_attention,
    hidden_states,
    layout,
    self_attention,
)
from wisparse_jax.models.kl import kl_of_states
from wisparse_jax.models.mesh import data_size, mesh_of, on_host
from wisparse_jax.sparsity.score import ChannelGains, block_rules

# Exponents, thresholds and the like of every candidate, `[chunks, chunk, ...]` each.
Candidates = tuple[Array, ...]
_BEFORE_ATTENTION = len(INPUT_GROUPS["attn_in"])  # of a block's layers, q, k and v: the first ones
# Exponents and thresholds of candidates for one block in, each candidate's error out.
BlockObjective = Callable[
    [Float64[np.ndarray, "candidates 7"], Float64[np.ndarray, "candidates 7"]], Float64[np.ndarray, " candidates"]
]


@dataclasses.dataclass(frozen=True)
class LossSettings(Settings):
    """Settings of the losses of candidates."""

    chunk: int = setting(8, largest=2**14)  # candidates that are evaluated at once on each device: bounds the memory


class BlockLoss:
    """Mean squared error of one block's output on its dense inputs, for many candidates at once."""

    def __init__(self, calibration: Calibration, index: int, sparse_tokens: int, chunk: int):
        n = calibration.windows_for(sparse_tokens)
        self._static = (calibration.config, calibration.config.windows[index], calibration.dense_positions)
        self._chunk, self._where = chunk, f"block {index}"
        self.tokens = n * calibration.tokens.shape[1] / calibration.config.num_blocks  # of a model's forward, each
        self._arrays = (
            calibration.params["blocks"][index],
            calibration.gains[index],
            calibration.inputs[index][:n],
            calibration.inputs[index + 1][:n],
            jax.tree.map(lambda a: a[:n], calibration.caches[index]),
        )

    def __call__(
        self, exponents: Float64[np.ndarray, "candidates 7"], thresholds: Float64[np.ndarray, "candidates 7"]
    ) -> Float64[np.ndarray, " candidates"]:
        """The loss of each candidate."""
        before = np.concatenate([table[:, :_BEFORE_ATTENTION] for table in (exponents, thresholds)], axis=1)
        _, rows, attention = np.unique(before, axis=0, return_index=True, return_inverse=True)
        # A power of two of them, so that few different numbers are compiled for.
        rows = np.resize(rows, min(1 << (len(rows) - 1).bit_length(), len(thresholds)))
        distinct = _padded(self._chunk, exponents[rows], thresholds[rows])
        candidates = _padded(self._chunk, exponents, thresholds, attention.reshape(-1))
        loss = _block_losses(*self._static, *self._arrays, distinct, candidates)
        return _comparable(on_host(loss).astype(np.float64)[: len(thresholds)], self._where)


class KLLoss:
    """Mean over tokens of KL(dense || sparse) of the whole model, for many candidates at once.

    Candidates are spread over all given devices, each with the whole model; where the weights lie on a mesh, over its
    data axis.
    """

    def __init__(
        self,
        calibration: Calibration,
        sparse_tokens: int,
        chunk: int,
        devices: Sequence[jax.Device] | None = None,
    ):
        n = calibration.windows_for(sparse_tokens)
        own = mesh_of(calibration.params)
        self._mesh = own if data_size(own) > 1 else None
        self._static = (calibration.config, calibration.dense_positions)
        self._chunk = chunk
        self.tokens = n * calibration.tokens.shape[1]  # that one candidate is run on
        self._arrays = (
            calibration.params,
            calibration.gains,
            calibration.tokens[:n],
            calibration.hidden[:n],
            jax.tree.map(lambda a: a[:n], calibration.caches),
        )
        devices = jax.local_devices() if devices is None else devices
        if own is None and len(devices) > 1:
            self._mesh = Mesh(np.asarray(devices), ("candidates",))
            self._arrays = jax.device_put(self._arrays, NamedSharding(self._mesh, PartitionSpec()))

    def __call__(
        self,
        exponents: Float64[np.ndarray, "blocks 7"],
        thresholds: Float64[np.ndarray, "candidates blocks 7"],
    ) -> Float64[np.ndarray, " candidates"]:
        """The divergence of each candidate, nats per token; all share the exponents.

        Raises:
            WisparseError: no candidate has a finite one.
        """
        shares = 1 if self._mesh is None else self._mesh.shape[self._mesh.axis_names[0]]
        candidates = _padded(self._chunk, np.broadcast_to(exponents, thresholds.shape), thresholds, shares=shares)
        loss = _kl_of_candidates(*self._static, self._mesh, *self._arrays, candidates)
        return _comparable(on_host(loss).astype(np.float64)[: len(thresholds)], "the model")


def _comparable(losses: Float64[np.ndarray, " candidates"], where: str) -> Float64[np.ndarray, " candidates"]:
    """Infinity in place of what is not a number, so that it never is the least."""
    losses = np.where(np.isnan(losses), np.inf, losses)
    if not np.isfinite(losses).any():
        raise WisparseError(f"{where}: no candidate has a finite loss; do activations overflow when it runs sparse?")
    return losses


def _padded(chunk: int, *tables: np.ndarray, shares: int = 1) -> Candidates:
    """The tables in 32 bits as `[chunks, at most chunk, ...]`, evenly filled; the last candidate fills up.

    There are as many chunks for each of `shares` devices.
    """
    count = len(tables[0])
    own = -(-count // shares)
    chunk = -(-own // -(-own // chunk))
    rows = np.minimum(np.arange(-(-own // chunk) * chunk * shares), count - 1)
    types = {"f": jnp.float32, "i": jnp.int32}
    return tuple(jnp.asarray(t[rows], types[t.dtype.kind]).reshape(-1, chunk, *t.shape[1:]) for t in tables)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _block_losses(
    config: LlamaConfig,
    window: int | None,
    first: int,
    params: Params,
    gains: ChannelGains,
    inputs: Float[Array, "windows positions hidden"],
    targets: Float[Array, "windows positions hidden"],
    cache: BlockCache,
    distinct: Candidates,
    candidates: Candidates,
) -> Float[Array, " candidates"]:
    """The candidates are exponents, thresholds, and which of `distinct` is the same before the o projection."""
    where = layout(config, 1, inputs.shape[1], first)

    def losses(x: Array, target: Array, kv: BlockCache) -> Array:
        def before(alpha: Array, threshold: Array) -> Array:
            return self_attention(
                config, window, params, x[None], where, _row(kv), block_rules(gains, alpha, threshold)
            )[0]

        attention = _each(before, distinct)

        def after(alpha: Array, threshold: Array, which: Array) -> Array:
            out = after_attention(config, params, x[None], attention[which], block_rules(gains, alpha, threshold))
            return jnp.sum(jnp.square((out[0] - target).astype(jnp.float32)))

        return _each(after, candidates)

    return _mean_over_windows(losses, (inputs, targets, cache)) / inputs[0].size


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _kl_of_candidates(
    config: LlamaConfig,
    first: int,
    mesh: Mesh | None,
    params: Params,
    gains: list[ChannelGains],
    tokens: Int[Array, "windows positions"],
    hidden: Float[Array, "windows positions hidden"],
    caches: Cache,
    candidates: Candidates,
) -> Float[Array, " candidates"]:
    run = functools.partial(_own_kl, config, first)
    if mesh is not None:
        axis = mesh.axis_names[0]  # along the others lies the model
        whole, own = PartitionSpec(), PartitionSpec(axis)
        specs = (whole,) * 5 + (own,)
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=own, axis_names={axis}, check_vma=False)
    return run(params, gains, tokens, hidden, caches, candidates)


def _own_kl(
    config: LlamaConfig,
    first: int,
    params: Params,
    gains: list[ChannelGains],
    tokens: Int[Array, "windows positions"],
    hidden: Float[Array, "windows positions hidden"],
    caches: Cache,
    candidates: Candidates,
) -> Float[Array, " candidates"]:
    where: Layout = layout(config, 1, tokens.shape[1], first)

    def losses(ids: Array, dense: Array, kv: Cache) -> Array:
        def one(alpha: Array, threshold: Array) -> Array:
            rules = [block_rules(own, alpha[b], threshold[b]) for b, own in enumerate(gains)]
            out, _ = hidden_states(config, params, ids[None], where, [_row(c) for c in kv], rules)
            return jnp.mean(kl_of_states(params, dense, out[0]))

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
