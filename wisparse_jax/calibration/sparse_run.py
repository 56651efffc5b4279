"""The sparse model's own run over the calibration text, which sets the thresholds as it goes.

A layer of a sparse model reads what the sparse layers before it made, not what dense ones would have: thresholds taken
from dense activations realise another sparsity than the plan's. Here every layer's threshold is the quantile of the
scores that it meets, with all layers before it sparse already, so that on this text the plan keeps its word.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from kernels_pallas.weight import Weight
from wisparse_jax.calibration.dense import Calibration
from wisparse_jax.calibration.statistics import spaced_tokens, threshold_between
from wisparse_jax.models.config import INPUT_GROUPS, LAYERS, LlamaConfig
from wisparse_jax.models.forward import BlockCache, Params, after_attention, layout, rms_norm, self_attention
from wisparse_jax.models.mesh import on_host
from wisparse_jax.models.rules import BlockRules, ChannelRule
from wisparse_jax.sparsity.score import ChannelGains, score_weights

Biases = list[dict[str, Float[Array, "_"]]]


class ScoreThresholds(NamedTuple):
    """Of every layer: its threshold on the score (the paper's tau), and the share of scores below it on the text."""

    values: Float64[np.ndarray, "blocks 7"]
    realised: Float64[np.ndarray, "blocks 7"]


def sparse_thresholds(
    calibration: Calibration,
    exponents: Float64[np.ndarray, "blocks 7"],
    sparsities: Float64[np.ndarray, "blocks 7"],
    biases: Biases | None = None,
    more: Calibration | None = None,
) -> ScoreThresholds:
    """The thresholds that realise the sparsities on the calibration text, layer after layer.

    Args:
        calibration: the dense run, with the gains of the score.
        exponents: of every layer.
        sparsities: of every layer.
        biases: that the sparse model adds.
        more: the same model's run on further windows of the text.

    Returns:
        Thresholds in the units of the score, and the realised sparsities, both `[blocks, 7]`.
    """
    config, first = calibration.config, calibration.dense_positions
    runs = [calibration] if more is None else [calibration, more]
    x, thresholds, realised = jnp.concatenate([run.inputs[0] for run in runs]), [], []
    for b, weights in enumerate(calibration.params["blocks"]):
        cache = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(run.caches[b] for run in runs))
        table = [jnp.asarray(a[b], jnp.float32) for a in (exponents, sparsities)]
        bias = None if biases is None else biases[b]
        arguments = weights, x, cache, calibration.gains[b], *table, bias
        x, threshold, share = _sparse_block(config, config.windows[b], first, *arguments)
        thresholds.append(threshold)
        realised.append(share)
    tables = [[on_host(row).astype(np.float64) for row in rows] for rows in (thresholds, realised)]
    return ScoreThresholds(*map(np.stack, tables))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sparse_block(
    config: LlamaConfig,
    window: int | None,
    first: int,
    params: Params,
    x: Float[Array, "windows positions hidden"],
    cache: BlockCache,
    gains: ChannelGains,
    exponents: Float[Array, "7"],
    sparsities: Float[Array, "7"],
    biases: dict[str, Array] | None,
) -> tuple[Float[Array, "windows positions hidden"], Float[Array, "7"], Float[Array, "7"]]:
    """The block's sparse output, and each layer's threshold and realised sparsity."""
    where = layout(config, x.shape[0], x.shape[1], first)
    thresholds, shares = {}, {}
    # Keeps all until a layer's turn comes: its input depends on the layers before it alone.
    rules: BlockRules = {
        name: ChannelRule(jnp.zeros(Weight.of(params[name]).shape[0]), None if biases is None else biases[name])
        for name in LAYERS
    }

    def settle(group: str, inputs: Array) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1])
        rows = jnp.abs(rows[spaced_tokens(*rows.shape)]).astype(jnp.float32)
        for name in INPUT_GROUPS[group]:
            i = LAYERS.index(name)
            weights = score_weights(gains[name], exponents[i])
            thresholds[name], shares[name] = threshold_between((rows * weights[None]).ravel(), sparsities[i])
            rules[name] = rules[name]._replace(thresholds=thresholds[name] / weights)

    settle("attn_in", rms_norm(x, params["attn_norm"], config.norm_eps))
    attention, _ = self_attention(config, window, params, x, where, cache, rules)
    settle("attn_out", attention)
    for group, reader in (("mlp_in", "gate"), ("mlp_mid", "down")):
        record: dict[str, Array] = {}
        after_attention(config, params, x, attention, rules, record)  # of this only the reader's input is computed
        settle(group, record[reader])
    out = after_attention(config, params, x, attention, rules)
    return out, jnp.stack([thresholds[name] for name in LAYERS]), jnp.stack([shares[name] for name in LAYERS])
