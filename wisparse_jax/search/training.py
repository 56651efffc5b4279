"""Scores and biases trained on KL to the dense model, with the budgets as they are.

What multiplies `|x_i|` in the score starts as it was found and is trained through the choice of channels: the choice is
hard in the forward pass, and has the slope of a sigmoid in the backward pass (a straight-through estimator), with the
threshold moving so that the layer's sparsity stays. A constant vector for each block linear, added where it runs sparse
(as SPON, arXiv 2512.12744), stands in for what is skipped. The text is short beside all these numbers, so windows that
are held out say when to stop. The pass back walks the blocks one by one: memory holds the activations of one, and one
program serves all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Float64

from kernels_pallas.sparse_linear.reference import dot
from kernels_pallas.weight import Weight
from wisparse_jax.calibration.dense import Calibration
from wisparse_jax.calibration.sparse_run import Biases
from wisparse_jax.calibration.statistics import threshold_between
from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.forward import BlockCache, Params, block, layout, rms_norm, top_params
from wisparse_jax.models.kl import kl_of_states
from wisparse_jax.models.mesh import on_host
from wisparse_jax.sparsity.score import ChannelGains, score_weights

# Tokens whose scores set the threshold of a step: on a CPU all of them take as long as the products.
QUANTILE_TOKENS = 512
# Looks at the held-out windows without a better one before training stops.
PATIENCE = 4
# Of the sigmoid that stands for the choice, in units of ln(score): a channel 10 % off the threshold counts for half.
WIDTH = 0.1
_TINY = 1e-30


class Trained(NamedTuple):
    """What is trained, by block and layer name."""

    log_gains: list[ChannelGains]  # ln of what multiplies |x_i| in the score
    biases: Biases


class _SoftRule(NamedTuple):
    """A layer's rule during training: it skips its share of whatever it meets, and the choice has a gradient."""

    log_gains: Float[Array, " in_channels"]
    sparsity: Float[Array, ""]
    bias: Float[Array, " out"]

    def product(self, inputs: Float[Array, "*batch in_channels"], weight: Weight) -> Float[Array, "*batch out"]:
        """What the kept channels add up to."""
        wide = functools.partial(lax.broadcast_to_rank, rank=inputs.ndim)
        size = jnp.abs(lax.stop_gradient(inputs)).astype(jnp.float32)
        fixed = lax.stop_gradient(self.log_gains)
        scores = size * wide(jnp.exp(fixed))
        rows = scores.reshape(-1, scores.shape[-1])
        threshold, _ = threshold_between(rows[:: max(1, len(rows) // QUANTILE_TOKENS)].ravel(), self.sparsity)
        distance = jnp.log(size + _TINY) + wide(self.log_gains) - jnp.log(threshold + _TINY)
        # How many scores lie near the threshold says how far it moves when the gains do.
        near = jax.nn.sigmoid(lax.stop_gradient(distance) / WIDTH)
        near = near * (1.0 - near)
        moved = jnp.sum(near * wide(self.log_gains - fixed)) / (jnp.sum(near) + _TINY)
        soft = jax.nn.sigmoid((distance - moved) / WIDTH)
        kept = (scores >= threshold).astype(jnp.float32)
        return dot(inputs * (lax.stop_gradient(kept - soft) + soft).astype(inputs.dtype), weight)


def start_of(calibration: Calibration, exponents: Float64[np.ndarray, "blocks 7"]) -> Trained:
    """The scores as they are, and biases that change nothing."""
    table = jnp.asarray(exponents, jnp.float32)
    gains = [
        {name: jnp.log(score_weights(row[name], table[b, i])) for i, name in enumerate(LAYERS)}
        for b, row in enumerate(calibration.gains)
    ]
    shapes = calibration.config.layer_shapes
    return Trained(gains, [{name: jnp.zeros(shapes[name][1]) for name in LAYERS} for _ in gains])


def train(
    training: Calibration,
    held_out: Calibration,
    start: Trained,
    sparsities: Float64[np.ndarray, "blocks 7"],
    steps: int,
    tokens: int,
    every: int,
    rates: tuple[float, float],
    seed: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[Trained, Float64[np.ndarray, "looks windows"]]:
    """What of least held-out KL Adam meets, and each window's KL at the start and after every so many steps.

    Args:
        training: the dense run on the windows to learn from.
        held_out: the dense run, in the same basis, on the windows to stop by.
        start: where to begin.
        sparsities: of every layer, which stay.
        steps: of Adam, at most.
        tokens: sparse positions of a step, in whole windows.
        every: steps between two looks at the held-out windows.
        rates: learning rates of the gains' logarithms and of the biases, at the start; they fall to 0 by a cosine, and
            one of 0 leaves its part as it is.
        seed: of the windows of each step.
        progress: around the numbers of the steps.
    """
    windows, positions = training.tokens.shape
    batch = max(1, min(windows, tokens // positions))
    table = jnp.asarray(sparsities, jnp.float32)
    own = [{"gains": gains, "biases": biases} for gains, biases in zip(*start, strict=True)]
    states = [optax.scale_by_adam().init(part) for part in own]
    best, curve, stale = own, [_held_out_kl(held_out, own, table, batch)], 0
    least = curve[0].mean()
    rng, before = np.random.default_rng(seed), own
    ticks = iter(progress(range(steps)))
    for look in range(-(-steps // every)):
        if stale >= PATIENCE:
            break
        for step, _ in zip(range(look * every, min(steps, (look + 1) * every)), ticks, strict=False):
            # What the bar says is done is done, but for one step that the device has at hand.
            jax.block_until_ready(before)
            before = own
            rows = np.sort(rng.choice(windows, batch, replace=False))
            fall = 0.5 * (1.0 + np.cos(np.pi * step / steps))
            scaled = {"gains": jnp.float32(rates[0] * fall), "biases": jnp.float32(rates[1] * fall)}
            own, states = _step(training, own, states, table, rows, scaled)
        curve.append(_held_out_kl(held_out, own, table, batch))
        stale += 1
        if curve[-1].mean() < least:
            best, least, stale = own, curve[-1].mean(), 0
    return Trained([part["gains"] for part in best], [part["biases"] for part in best]), np.stack(curve)


def _step(
    training: Calibration, own: list[Any], states: list[Any], table: Array, rows: np.ndarray, rates: dict[str, Array]
) -> tuple[list[Any], list[Any]]:
    """One step of Adam: forward over the blocks, then back, where each block is computed once more."""
    config, first, blocks = training.config, training.dense_positions, training.params["blocks"]
    inputs = _forward(training, own, table, rows)
    gradient = _gradient(config, top_params(training.params), inputs.pop(), training.hidden[rows])
    own, states = list(own), list(states)
    for b in reversed(range(config.num_blocks)):
        cache = jax.tree.map(lambda a: a[rows], training.caches[b])
        gradient, own[b], states[b] = step_block(
            config, config.windows[b], first, blocks[b], inputs.pop(), cache, own[b], states[b], table[b], gradient,
            rates,
        )  # fmt: skip
    return own, states


def _forward(calibration: Calibration, own: list[Any], table: Array, rows: np.ndarray) -> list[Array]:
    """What enters each block of the sparse model, and what leaves the last one."""
    config, first = calibration.config, calibration.dense_positions
    xs = [calibration.inputs[0][rows]]
    for b, weights in enumerate(calibration.params["blocks"]):
        cache = jax.tree.map(lambda a: a[rows], calibration.caches[b])
        xs.append(forward_block(config, config.windows[b], first, weights, xs[-1], cache, own[b], table[b]))
    return xs


def _held_out_kl(calibration: Calibration, own: list[Any], table: Array, batch: int) -> Float64[np.ndarray, " windows"]:
    """The mean KL of each window."""
    parts, count = [], len(calibration.tokens)
    for at in range(0, count, batch):
        # The last batch is filled up from the start: its scores set the thresholds, which copies of one window move.
        rows = np.arange(at, at + batch) % count
        x = _forward(calibration, own, table, rows)[-1]
        values = _window_kl(calibration.config, top_params(calibration.params), x, calibration.hidden[rows])
        parts.append(on_host(values).astype(np.float64)[: count - at])
    return np.concatenate(parts)


def _run_block(
    config: LlamaConfig,
    window: int | None,
    first: int,
    params: Params,
    x: Float[Array, "windows positions hidden"],
    cache: BlockCache,
    own: Any,
    sparsities: Float[Array, "7"],
) -> Float[Array, "windows positions hidden"]:
    rules: Any = {
        name: _SoftRule(own["gains"][name], sparsities[i], own["biases"][name]) for i, name in enumerate(LAYERS)
    }
    return block(config, window, params, x, layout(config, x.shape[0], x.shape[1], first), cache, rules)[0]


forward_block = functools.partial(jax.jit, static_argnums=(0, 1, 2))(_run_block)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def step_block(
    config: LlamaConfig,
    window: int | None,
    first: int,
    params: Params,
    x: Float[Array, "windows positions hidden"],
    cache: BlockCache,
    own: Any,
    state: Any,
    sparsities: Float[Array, "7"],
    gradient: Float[Array, "windows positions hidden"],
    rates: dict[str, Float[Array, ""]],
) -> tuple[Float[Array, "windows positions hidden"], Any, Any]:
    """The gradient with respect to the block's input, and what is trained of it after its step."""
    _, back = jax.vjp(lambda x, own: _run_block(config, window, first, params, x, cache, own, sparsities), x, own)
    before, change = back(gradient)
    with jax.numpy_dtype_promotion("standard"):  # Optax takes powers of whole numbers, which a user may forbid
        found, state = optax.scale_by_adam().update(change, state)
    moves: Any = found
    moved = {
        part: jax.tree.map(lambda value, move: value - rates[part] * move, own[part], moves[part])  # noqa: B023
        for part in own
    }
    return before, moved, state


@functools.partial(jax.jit, static_argnums=0)
def _window_kl(
    config: LlamaConfig,
    top: Params,
    x: Float[Array, "windows positions hidden"],
    dense: Float[Array, "windows positions hidden"],
) -> Float[Array, " windows"]:
    """KL(dense || sparse) of each window; `dense` is normed already."""
    out = rms_norm(x, top["norm"], config.norm_eps)
    return jnp.mean(kl_of_states(top, dense, out), axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(
    config: LlamaConfig,
    top: Params,
    x: Float[Array, "windows positions hidden"],
    dense: Float[Array, "windows positions hidden"],
) -> Float[Array, "windows positions hidden"]:
    return jax.grad(lambda x: jnp.mean(_window_kl(config, top, x, dense)))(x)
