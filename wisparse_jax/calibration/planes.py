"""Gains, thresholds and costs of every plane of every layer, by two walks of the gradients; and planes without them.

What plane k of channel i adds to a layer's output for a token is `x_i P_ki`, and with u_k = P_k g, g the gradient of
the log-probability of a sampled label, leaving it out for some channels costs half the mean square of the sum of their
`x_i u_ki`: the second-order cost of `calibration.gradients` with the plane P_k in place of W.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels_pallas.formats import FORMATS
from kernels_pallas.weight import Weight
from wisparse_jax.calibration.dense import Calibration
from wisparse_jax.calibration.gradients import Blocks, costs_at, gradient_gains
from wisparse_jax.calibration.statistics import STEPS, BlockStatistics
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.forward import Params
from wisparse_jax.models.model import Model
from wisparse_jax.models.quantise import quantise_params
from wisparse_jax.models.rules import ChannelRule
from wisparse_jax.sparsity.planes import LEVELS, PlaneCurves, plane_thresholds


class Depth(NamedTuple):
    """A weight in planes, read so far."""

    bits: float  # of a weight
    left: float  # share of a channel's energy that is lost still


Depths = tuple[Depth, ...]


def depths_of(params: Params, kind: str) -> Depths:
    """What is left of the energy of the first block's weights when planes 0 to k are read, for each k."""
    form = FORMATS[kind]
    energy, left = 0.0, np.zeros(len(form.planes))
    for name in LAYERS:
        rest = Weight.of(params["blocks"][0][name]).wide()
        energy += float(jnp.sum(jnp.square(rest)))
        for k, plane in enumerate(form.wide_planes(*form.quantise(rest), jnp.float32)):
            rest = rest - plane
            left[k] += float(jnp.sum(jnp.square(rest)))
    bits = np.cumsum(form.plane_bits).tolist()
    return tuple(Depth(*pair) for pair in zip(bits, (left / energy).tolist(), strict=True))


def plane_curves(
    calibration: Calibration, kind: str, planes: Blocks, tokens: int, seed: int, magnitudes: bool = False
) -> PlaneCurves:
    """The curves of a model's planes, in the basis of its dense run.

    Args:
        calibration: the dense run, in the model's own weights.
        kind: the name of the format.
        planes: the blocks' layers in that format.
        tokens: sparse positions of each of the two walks, at least.
        seed: of the labels.
        magnitudes: the score is |x_i|, and each plane costs the same per bit in all layers, so that every budget reads
            it for one share of the channels everywhere.
    """
    gains = gradient_gains(calibration, tokens, seed, planes)
    if magnitudes:
        gains = [{name: jnp.ones_like(gain) for name, gain in block.items()} for block in gains]
    ones, count = np.ones(len(LAYERS)), len(gains[0][LAYERS[0]])
    grid = np.repeat(LEVELS[:, None], len(LAYERS), axis=1)
    thresholds = np.zeros((len(gains), len(LAYERS), count, len(LEVELS)))
    for b, own in enumerate(calibration.statistics):
        for k in range(count):
            scored = BlockStatistics(own.samples, {name: gains[b][name][k] for name in LAYERS})
            thresholds[b, :, k] = scored.thresholds(ones, grid).T
    costs = costs_at(calibration, gains, np.ones(thresholds.shape[:2]), thresholds, tokens, seed, planes)
    costs -= costs[..., :1]
    if magnitudes:
        share = np.asarray(calibration.config.layer_weights, np.float64)[None, :, None, None]
        costs = costs.sum(axis=(0, 1), keepdims=True) * (share / share.sum() / len(costs))
        costs = np.broadcast_to(costs, thresholds.shape)
    return PlaneCurves(
        kind, LEVELS.astype(np.float32).astype(np.float64), _as_saved(thresholds), _as_saved(costs), gains
    )


def _as_saved(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).astype(np.float64)


def uniform_planes(calibration: Calibration, kind: str, target: float) -> Model:
    """The model of a calibration in planes, each layer reading the same share of its bits, without any gradients.

    The score is `|x_i| |W_i|`. A plane is read where what it adds of a channel's energy is worth its bits, at a price
    that is the layer's own, so that its sampled activations leave the share `target` of the bits unread.
    """
    config, form = calibration.config, FORMATS[kind]
    bits = np.asarray(form.plane_bits) / sum(form.plane_bits)
    left = [1.0, *(depth.left for depth in depths_of(calibration.params, kind))]
    ratios = np.maximum.accumulate(np.sqrt(bits / -np.diff(left)))  # of the planes' thresholds
    steps, rules = np.arange(STEPS + 1) / STEPS, []
    for statistics in calibration.statistics:
        block = {}
        for name in LAYERS:
            table = statistics.table(name, 1.0)
            # Of the price of a unit of energy the square root: the shares unread rise with it.
            prices = np.sort(np.concatenate([table / ratio for ratio in ratios]))
            unread = bits @ [np.interp(prices * ratio, table, steps) for ratio in ratios]
            thresholds = ratios * prices[min(int(np.searchsorted(unread, target)), len(prices) - 1)]
            gains = jnp.broadcast_to(statistics.gains[name], (len(bits), *statistics.gains[name].shape))
            block[name] = ChannelRule(plane_thresholds(gains, thresholds))
        rules.append(block)
    return Model(config, quantise_params(calibration.params, kind), rules)
