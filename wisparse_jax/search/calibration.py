"""The dense model's own run over the calibration text, done once and shared by every stage and method."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import INPUT_GROUPS, LlamaConfig
from wisparse_jax.models.forward import BlockCache, Cache, Params, block, layout, rms_norm
from wisparse_jax.search.settings import SearchSettings
from wisparse_jax.search.statistics import BlockStatistics
from wisparse_jax.sparsity.score import BlockNorms, model_norms


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What the stages need to know of the dense run; arrays are over the sparse positions of each window.

    `inputs[b]` is the residual stream that enters block b, `inputs[-1]` what leaves the last one;
    `caches[b]` holds the keys and values of whole windows, of which a sparse run overwrites the sparse positions.
    """

    config: LlamaConfig
    params: Params
    tokens: Int[Array, "windows positions"]
    dense_positions: int  # at the start of each window
    inputs: list[Float[Array, "windows positions hidden"]]
    hidden: Float[Array, "windows positions hidden"]  # final, normed
    caches: Cache
    norms: list[BlockNorms]
    statistics: list[BlockStatistics]

    def windows_for(self, sparse_tokens: int) -> int:
        """How many of the windows hold at least that many sparse positions (all, if there are fewer)."""
        return min(len(self.tokens), -(-sparse_tokens // self.tokens.shape[1]))


def run_dense(
    config: LlamaConfig,
    params: Params,
    tokens: Int32[np.ndarray, "windows length"],
    settings: SearchSettings,
    seed: int,
) -> Calibration:
    """Run the dense model over the windows, keep what the stages need and sample the statistics.

    Raises:
        WisparseError: no windows, windows longer than the model's context, or token ids outside the vocabulary.
    """
    check_tokens(config, tokens)
    count, length = tokens.shape
    positions = settings.sparse_positions(length)
    first = length - positions
    taken = _sampled_positions(count * positions, settings.statistics_tokens, seed)
    norms = model_norms(params)

    x = params["embed"][jnp.asarray(tokens)]
    inputs, caches, statistics = [x[:, first:]], [], []
    for b, weights in enumerate(params["blocks"]):
        x, cache, recorded = _record_block(config, config.windows[b], first, weights, x)
        inputs.append(x[:, first:])
        caches.append(cache)
        samples = {
            group: np.asarray(recorded[group].reshape(count * positions, -1)[taken], np.float32)
            for group in INPUT_GROUPS
        }
        statistics.append(BlockStatistics(samples, {k: np.asarray(v) for k, v in norms[b].items()}))
    hidden = rms_norm(inputs[-1], params["norm"], config.norm_eps)
    return Calibration(config, params, jnp.asarray(tokens[:, first:]), first, inputs, hidden, caches, norms, statistics)


def check_tokens(config: LlamaConfig, tokens: Int32[np.ndarray, "windows length"]) -> None:
    """Refuse windows that the model cannot read.

    Raises:
        WisparseError: no windows, too short or too long ones, or token ids outside the vocabulary.
    """
    count, length = tokens.shape
    if count < 1 or length < 2:
        raise WisparseError(f"expected at least one window of two tokens, found {count} of {length}")
    if length > config.context:
        raise WisparseError(f"windows of {length} tokens are longer than the model's context of {config.context}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        raise WisparseError(f"token id {low if low < 0 else high} is outside the vocabulary of {config.vocab_size}")


def _sampled_positions(available: int, wanted: int, seed: int) -> np.ndarray:
    if wanted >= available:
        return np.arange(available)
    return np.sort(np.random.default_rng(seed).choice(available, wanted, replace=False))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _record_block(
    config: LlamaConfig, window: int | None, first: int, params: Params, x: Float[Array, "windows length hidden"]
) -> tuple[Float[Array, "windows length hidden"], BlockCache, dict[str, Any]]:
    record: dict[str, Any] = {}
    out, cache = block(config, window, params, x, layout(config, x.shape[0], x.shape[1]), record=record)
    groups = {group: jnp.abs(record[layers[0]][:, first:]) for group, layers in INPUT_GROUPS.items()}
    return out, cache, groups
