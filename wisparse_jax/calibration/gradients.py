"""Second-order costs: what skipping channels does to the model's predictions, from one backward pass.

For a small error e of a layer's output, `KL(dense || changed)` is half the mean over tokens of `(g . e)^2` to second
order, where g is the gradient of the log-probability of a token that is sampled from the dense model (its covariance is
the Fisher matrix of the predictions). With `e = (skipped x) W` that is the sum of `x_i u_i` over the skipped channels,
`u = W g`: so one pass that walks the blocks from the last to the first gives the cost of every layer at every sparsity,
and says how much a unit of each channel counts. Memory holds one block's gradients of a few windows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float64, Int, Key

from kernels_pallas.weight import Weight
from wisparse_jax.calibration.dense import Calibration
from wisparse_jax.calibration.statistics import GROUP_OF
from wisparse_jax.models.config import INPUT_GROUPS, LAYERS, LlamaConfig
from wisparse_jax.models.forward import BlockCache, Params, block, head, layout, rms_norm, top_params
from wisparse_jax.models.keys import random_key
from wisparse_jax.models.mesh import on_host
from wisparse_jax.models.rules import ChannelRule
from wisparse_jax.sparsity.score import ChannelGains, score_weights

# Sparse positions whose gradients are held at once.
TOKENS_AT_ONCE = 1024
# The blocks' layers by name.
Blocks = list[Params]
# Added to the mean square of a channel's gradient, in units of the layer's mean: no channel counts for nothing.
GAIN_FLOOR = 1e-3


class BlockGradients(NamedTuple):
    """Of some windows, what a block's linears read, and the gradients with respect to it, token by token."""

    inputs: dict[str, Float[Array, "tokens in_channels"]]  # by input group
    gradients: dict[str, Float[Array, "*planes tokens in_channels"]]  # by layer: u = W g, or of each plane of W


def walk_gradients(
    calibration: Calibration, tokens: int, seed: int, draw: int = 0, planes: Blocks | None = None
) -> Iterator[tuple[int, BlockGradients]]:
    """Every block of every few windows, from the last block to the first; at least `tokens` sparse positions in all.

    Where there are fewer, the windows are walked again with other sampled labels. Another `draw` has other labels, too.
    `planes` are the blocks' layers in a format of planes: then there is a gradient `P g` for each plane P.
    """
    windows, positions = calibration.tokens.shape
    together = max(1, min(windows, TOKENS_AT_ONCE // positions))
    config, params, first = calibration.config, calibration.params, calibration.dense_positions
    for k in range(-(-tokens // (together * positions))):
        rows = (k * together + np.arange(together)) % windows
        key = jax.random.fold_in(jax.random.fold_in(random_key(seed), draw), k)
        gradient = _last_gradient(config, top_params(params), calibration.inputs[-1][rows], key)
        for b in reversed(range(config.num_blocks)):
            cache = jax.tree.map(lambda a: a[rows], calibration.caches[b])  # noqa: B023
            weights = params["blocks"][b]
            read = weights if planes is None else planes[b]
            gradient, made = _block_gradients(
                config, config.windows[b], first, weights, calibration.inputs[b][rows], cache, gradient, read
            )
            yield b, made


@functools.partial(jax.jit, static_argnums=0)
def _last_gradient(
    config: LlamaConfig, top: Params, x: Float[Array, "windows positions hidden"], key: Key[Array, ""]
) -> Float[Array, "windows positions hidden"]:
    """The gradient of log p of sampled labels with respect to what leaves the last block."""

    def logits(stream: Array) -> Array:
        return head(top, rms_norm(stream, top["norm"], config.norm_eps))

    def one(stream: Array, key: Key[Array, ""]) -> Array:
        out, back = jax.vjp(logits, stream)
        label: Int[Array, " positions"] = jax.random.categorical(key, out)
        # d log p(label) / d logits
        return back(jax.nn.one_hot(label, out.shape[-1]) - jax.nn.softmax(out))[0]

    return lax.map(lambda pair: one(*pair), (x, jax.random.split(key, len(x))))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _block_gradients(
    config: LlamaConfig,
    window: int | None,
    first: int,
    params: Params,
    x: Float[Array, "windows positions hidden"],
    cache: BlockCache,
    gradient: Float[Array, "windows positions hidden"],
    read: Params,
) -> tuple[Float[Array, "windows positions hidden"], BlockGradients]:
    where = layout(config, x.shape[0], x.shape[1], first)

    def run(x: Array, moved: dict[str, Array]) -> tuple[Array, dict[str, Any]]:
        record: dict[str, Any] = {}
        rules = {name: ChannelRule(None, moved[name]) for name in LAYERS}
        out, _ = block(config, window, params, x, where, cache, rules, record)
        return out, record

    still = {name: jnp.zeros((*x.shape[:2], config.layer_shapes[name][1]), x.dtype) for name in LAYERS}
    _, back, record = jax.vjp(run, x, still, has_aux=True)
    before, outputs = back(gradient)

    def rows(a: Array) -> Array:
        return a.reshape(-1, a.shape[-1]).astype(jnp.float32)

    inputs = {group: rows(record[layers[0]]) for group, layers in INPUT_GROUPS.items()}
    return before, BlockGradients(inputs, {name: _through(read[name], rows(outputs[name])) for name in LAYERS})


def _through(layer: Params, gradient: Float[Array, "tokens out"]) -> Float[Array, "*planes tokens in_channels"]:
    """`W g` of every token; of a weight in planes `P g` of each plane."""
    weight = Weight.of(layer)
    if len(weight.format.planes) == 1:
        return jnp.matmul(gradient, weight.wide().T, precision=lax.Precision.HIGH)
    return jnp.stack([jnp.matmul(gradient, plane.T, precision=lax.Precision.HIGH) for plane in weight.wide_planes()])


def gradient_gains(
    calibration: Calibration, tokens: int, seed: int, planes: Blocks | None = None
) -> list[ChannelGains]:
    """The root mean square of each channel's gradient, over the layer's or the plane's own mean, for the score."""
    blocks = calibration.config.num_blocks
    sums: list[ChannelGains] = [{} for _ in range(blocks)]
    for b, made in walk_gradients(calibration, tokens, seed, planes=planes):
        for name, gradient in made.gradients.items():
            square = jnp.mean(jnp.square(gradient), axis=-2)
            sums[b][name] = sums[b][name] + square if name in sums[b] else square
    return [{name: _gain(square) for name, square in row.items()} for row in sums]


@jax.jit
def _gain(square: Float[Array, "*planes in_channels"]) -> Float[Array, "*planes in_channels"]:
    mean = jnp.mean(square, axis=-1, keepdims=True)
    return jnp.sqrt(jnp.where(mean > 0, square / jnp.where(mean > 0, mean, 1.0), 1.0) + GAIN_FLOOR)


def layer_costs(
    calibration: Calibration,
    exponents: Float64[np.ndarray, "blocks 7"],
    levels: Float64[np.ndarray, " levels"],
    tokens: int,
    seed: int,
) -> Float64[np.ndarray, "blocks 7 levels"]:
    """The second-order cost of every layer at every sparsity of `levels`, nats per token; it never falls with it.

    `cost_l(p) = E[(sum of x_i u_i over the channels skipped at p)^2] / 2`; their sum over layers predicts the KL of a
    plan. From at least `tokens` sparse positions.
    """
    config = calibration.config
    thresholds = np.zeros((config.num_blocks, len(LAYERS), len(levels)))
    for b, statistics in enumerate(calibration.statistics):
        grid = np.repeat(levels[:, None], len(LAYERS), axis=1)
        thresholds[b] = statistics.thresholds(exponents[b], grid).T
    return costs_at(calibration, calibration.gains, exponents, thresholds, tokens, seed)


def costs_at(
    calibration: Calibration,
    gains: list[ChannelGains],
    exponents: Float64[np.ndarray, "blocks 7"],
    thresholds: Float64[np.ndarray, "blocks 7 *planes levels"],
    tokens: int,
    seed: int,
    planes: Blocks | None = None,
) -> Float64[np.ndarray, "blocks 7 *planes levels"]:
    """The same at thresholds on the score that ascend; with `planes`, and gains of each, of not reading each plane."""
    sums = [jnp.zeros(thresholds.shape[1:])] * len(thresholds)
    count = 0
    # Other labels than the gains and the basis were found with.
    for b, made in walk_gradients(calibration, tokens, seed, draw=1, planes=planes):
        count += b == 0
        table = [jnp.asarray(a[b], jnp.float32) for a in (exponents, thresholds)]
        sums[b] = sums[b] + _level_costs(made, gains[b], *table)
    costs = np.stack([on_host(one).astype(np.float64) for one in sums]) / count
    return np.maximum.accumulate(costs, axis=-1)


@jax.jit
def _level_costs(
    made: BlockGradients,
    gains: ChannelGains,
    exponents: Float[Array, "7"],
    thresholds: Float[Array, "7 *planes levels"],
) -> Float[Array, "7 *planes levels"]:
    rows = []
    for i, name in enumerate(LAYERS):
        x, u = made.inputs[GROUP_OF[name]], made.gradients[name]
        if u.ndim == 2:
            rows.append(_costs_of(x, u, gains[name], exponents[i], thresholds[i]))
        else:
            planes = zip(u, gains[name], thresholds[i], strict=True)
            rows.append(
                jnp.stack([_costs_of(x, own, gain, exponents[i], threshold) for own, gain, threshold in planes])
            )
    return jnp.stack(rows)


def _costs_of(
    x: Float[Array, "tokens in_channels"],
    u: Float[Array, "tokens in_channels"],
    gain: Float[Array, " in_channels"],
    exponent: Float[Array, ""],
    thresholds: Float[Array, " levels"],
) -> Float[Array, " levels"]:
    score, part = jnp.abs(x) * score_weights(gain, exponent)[None], x * u

    def cost(threshold: Array) -> Array:
        return 0.5 * jnp.mean(jnp.square(jnp.sum(jnp.where(score < threshold, part, 0.0), axis=-1)))

    return lax.map(cost, thresholds)
