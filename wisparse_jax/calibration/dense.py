"""The dense model's own run over the calibration text, done once and shared by every stage, method and target."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from wisparse_jax.calibration.settings import TextSettings
from wisparse_jax.calibration.statistics import BlockStatistics
from wisparse_jax.models.basis import Basis, fold, folded_config
from wisparse_jax.models.config import INPUT_GROUPS, LlamaConfig
from wisparse_jax.models.fingerprint import model_fingerprint
from wisparse_jax.models.finite import check_activations
from wisparse_jax.models.forward import BlockCache, Cache, Params, block, layout, rms_norm
from wisparse_jax.models.mesh import mesh_of, place_on, spread
from wisparse_jax.models.model import Model
from wisparse_jax.models.tokens import token_windows
from wisparse_jax.sparsity.score import ChannelGains, model_norms

Tokens = Int[Array, "windows length"] | Int[np.ndarray, "windows length"]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What the stages need to know of the dense run; arrays are over the sparse positions of each window.

    `inputs[b]` is the residual stream that enters block b, `inputs[-1]` what leaves the last one;
    `caches[b]` holds the keys and values of whole windows, of which a sparse run overwrites the sparse positions.
    With a `basis`, `config` and `params` are those of the folded model, and so is everything else.
    """

    config: LlamaConfig
    params: Params
    fingerprint: str  # of the model as it was loaded
    windows: Int32[np.ndarray, "windows length"]
    tokens: Int[Array, "windows positions"]
    dense_positions: int  # at the start of each window
    inputs: list[Float[Array, "windows positions hidden"]]
    hidden: Float[Array, "windows positions hidden"]  # final, normed
    caches: Cache
    gains: list[ChannelGains]
    statistics: list[BlockStatistics]
    text: str
    basis: Basis | None = None

    def windows_for(self, sparse_tokens: int) -> int:
        """How many of the windows hold at least that many sparse positions (all, if there are fewer)."""
        return min(len(self.tokens), -(-sparse_tokens // self.tokens.shape[1]))

    @property
    def record(self) -> dict[str, Any]:
        """What a plan says about the text."""
        sizes = {"tokens": int(self.windows.size), "window": int(self.windows.shape[1])}
        return {"text": self.text, **sizes, "sparse_positions": int(self.tokens.size)}

    def with_gains(self, gains: list[ChannelGains]) -> Calibration:
        """The same run with other channel gains in the score."""
        statistics = [BlockStatistics(old.samples, new) for old, new in zip(self.statistics, gains, strict=True)]
        return dataclasses.replace(self, gains=gains, statistics=statistics)


def run_dense(
    model: Model,
    tokens: Tokens,
    settings: TextSettings | None = None,
    seed: int = 0,
    text: str = "tokens given by the caller",
    basis: Basis | None = None,
) -> Calibration:
    """Run the dense model over the windows, keep what the stages need and sample the statistics.

    Args:
        model: the dense model.
        tokens: windows of calibration text.
        settings: which positions are sparse, and how many are sampled.
        seed: of the sample.
        text: where the tokens come from, for the plan's record.
        basis: run the model in this basis; the function is the same, the linears' inputs are others.

    Raises:
        WisparseError: no windows, windows longer than the model's context, token ids outside the vocabulary, or
            activations that overflow, with the block and the input.
    """
    config, params = model.config, model.params
    if basis is not None:
        folded = fold(config, params, basis)
        config = folded_config(config)
        params = place_on(mesh_of(params), config, folded)
    settings = TextSettings() if settings is None else settings
    return _run(config, params, model_fingerprint(model), tokens, settings, seed, text, basis)


def run_dense_on(calibration: Calibration, tokens: Tokens, settings: TextSettings, seed: int) -> Calibration:
    """The same model's run over other windows, in the same basis and with the same gains; as `run_dense`."""
    same = calibration.config, calibration.params, calibration.fingerprint
    run = _run(*same, tokens, settings, seed, calibration.text, calibration.basis)
    return run.with_gains(calibration.gains)


def _run(
    config: LlamaConfig,
    params: Params,
    fingerprint: str,
    tokens: Tokens,
    settings: TextSettings,
    seed: int,
    text: str,
    basis: Basis | None,
) -> Calibration:
    windows = token_windows(config, tokens)
    count, length = windows.shape
    positions = settings.sparse_positions(length)
    first = length - positions
    taken = _sampled_positions(count * positions, settings.statistics_tokens, seed)
    gains = model_norms(params)

    x = params["embed"][spread(mesh_of(params), windows)]
    inputs, caches, statistics = [x[:, first:]], [], []
    for b, weights in enumerate(params["blocks"]):
        x, cache, samples = _record_block(config, config.windows[b], first, weights, x, taken)
        check_activations(b, samples, x, "the calibration text")
        inputs.append(x[:, first:])
        caches.append(cache)
        statistics.append(BlockStatistics(samples, gains[b]))
    hidden = jax.block_until_ready(rms_norm(inputs[-1], params["norm"], config.norm_eps))
    return Calibration(
        config, params, fingerprint, windows, jnp.asarray(windows[:, first:]), first, inputs, hidden,
        caches, gains, statistics, text, basis,
    )  # fmt: skip


def _sampled_positions(available: int, wanted: int, seed: int) -> Int[Array, " positions"]:
    if wanted >= available:
        return jnp.arange(available, dtype=jnp.int32)
    chosen = np.random.default_rng(seed).choice(available, wanted, replace=False)
    return jnp.asarray(np.sort(chosen), jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _record_block(
    config: LlamaConfig,
    window: int | None,
    first: int,
    params: Params,
    x: Float[Array, "windows length hidden"],
    taken: Int[Array, " positions"],
) -> tuple[Float[Array, "windows length hidden"], BlockCache, dict[str, Array]]:
    """The block's output, its cache, and |x| of each input group at the taken positions."""
    record: dict[str, Any] = {}
    out, cache = block(config, window, params, x, layout(config, x.shape[0], x.shape[1]), record=record)
    groups = {group: record[layers[0]][:, first:] for group, layers in INPUT_GROUPS.items()}
    samples = {group: jnp.abs(v.reshape(-1, v.shape[-1])[taken]) for group, v in groups.items()}
    return out, cache, samples
