"""A basis in which skipping channels costs little: eigenvectors, then descent on the orthogonal group.

Start: the eigenvectors of the covariance of the normed stream, pooled over blocks and weighted by how much their
gradients count; for each key/value group, those of what attention gives to o. They make channels unequal. Refinement
makes them sparse as well. It goes down, by Adam through a Cayley map, first on the mean absolute value of the rotated
inputs, then on what is really lost: the energy of the channels that the score would skip, each weighted by the mean
square of its gradient, `E[z_i^2 (skipped)] E[u_i^2]` (the second-order cost without the products of two channels; with
them the descent fits the sampled gradients and generalises worse than its start). The means are over a few blocks and
tokens a step, so that the time of a step does not grow with the model's depth.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from wisparse_jax.calibration.dense import Calibration
from wisparse_jax.calibration.gradients import BlockGradients, walk_gradients
from wisparse_jax.calibration.planes import Depths
from wisparse_jax.models.basis import Basis
from wisparse_jax.models.config import INPUT_GROUPS
from wisparse_jax.models.forward import Params
from wisparse_jax.models.keys import random_key

STREAM_GROUPS = {"attn_in": "attn_norm", "mlp_in": "mlp_norm"}
GROUPS_A_STEP, TOKENS_A_STEP = 16, 512
# Numbers of the stream that are kept at most; evenly spaced tokens stand for all beyond it.
LARGEST_SAMPLE = 1 << 30
# Steps of Adam between two looks at the bar.
STEPS_AT_ONCE = 25


class Moments(NamedTuple):
    """What refinement needs of the dense model; groups are two a block, what q, k, v and what gate, up read."""

    stream: Float[Array, "groups tokens hidden"]  # the normed stream before the gain
    stream_gradients: Float[Array, "groups hidden hidden"]  # E[u u'], summed over the layers of the group
    heads: Float[Array, "blocks tokens kv_heads queries head_dim"]  # what attention gives to o
    head_gradients: Float[Array, "blocks kv_heads head_dim head_dim"]


def measure_moments(calibration: Calibration, tokens: int, seed: int) -> Moments:
    """One walk of the gradients, in bounded memory: samples of `tokens` positions at most, and sums over all."""
    config, blocks = calibration.config, calibration.config.num_blocks
    shape = (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
    every = max(1, -(-tokens * 2 * blocks * config.hidden_size // LARGEST_SAMPLE))
    samples: list[list[tuple[Array, Array]]] = [[] for _ in range(blocks)]
    sums: list[Any] = [None] * blocks
    count = 0
    for b, made in walk_gradients(calibration, tokens, seed):
        count += b == 0
        norms = {norm: calibration.params["blocks"][b][norm] for norm in STREAM_GROUPS.values()}
        stream, heads, *squares = _block_moments(shape, made, norms)
        samples[b].append((stream[:, ::every], heads[::every]))
        sums[b] = squares if sums[b] is None else jax.tree.map(jnp.add, sums[b], squares)
    streams = [jnp.concatenate([stream for stream, _ in row], axis=1) for row in samples]
    gradients, own = (jnp.concatenate([row[i] for row in sums]) / count for i in (0, 1))
    heads = jnp.stack([jnp.concatenate([heads for _, heads in row]) for row in samples])
    return Moments(jnp.concatenate(streams), gradients, heads, own.reshape(blocks, *own.shape[1:]))


@functools.partial(jax.jit, static_argnums=0)
def _block_moments(
    shape: tuple[int, int, int], made: BlockGradients, norms: Params
) -> tuple[Array, Array, Array, Array]:
    streams, gradients = [], []
    for group, norm in STREAM_GROUPS.items():
        gain = norms[norm].astype(jnp.float32)[None]
        # Channels that the gain puts out are not read, whatever they are.
        streams.append(made.inputs[group] * jnp.where(gain == 0, 0.0, 1.0 / jnp.where(gain == 0, 1.0, gain)))
        rows = [made.gradients[name] * gain for name in INPUT_GROUPS[group]]
        gradients.append(sum(row.T @ row for row in rows) / len(made.inputs[group]))
    heads = made.inputs["attn_out"].reshape(-1, *shape)
    own = made.gradients["o"].reshape(-1, *shape)
    squares = jnp.einsum("tkqd,tkqe->kde", own, own) / (len(own) * shape[1])
    return jnp.stack(streams), heads, jnp.stack(gradients), squares[None]


def start_basis(moments: Moments) -> Basis:
    """The eigenvectors of the stream's and of each head's second moments, those of the largest eigenvalues first."""
    energy = jnp.trace(moments.stream_gradients, axis1=1, axis2=2)

    def add(total: Array, group: tuple[Array, Array]) -> tuple[Array, None]:
        stream, weight = group
        return total + weight * stream.T @ stream / len(stream), None

    size = moments.stream.shape[-1]
    covariance, _ = jax.lax.scan(add, jnp.zeros((size, size)), (moments.stream, energy / energy.mean()))
    heads = jnp.einsum("btkqd,btkqe->bkde", moments.heads, moments.heads)
    return Basis(jnp.linalg.eigh(covariance)[1][:, ::-1], jnp.linalg.eigh(heads)[1][..., ::-1])


def refine_basis(
    moments: Moments,
    start: Basis,
    sparsity: float,
    steps: tuple[int, int, int],
    learning_rate: float,
    seed: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    depths: Depths = (),
) -> tuple[Basis, dict[str, Any]]:
    """The basis after descent from a start.

    Args:
        moments: of the model as it is.
        start: where to begin.
        sparsity: share of the channels whose energy counts as lost.
        steps: of Adam for the stream on its mean absolute value, for the stream on the energy that is skipped, and for
            the key/value groups on the latter.
        learning_rate: of Adam at its start; it falls to 0 by a cosine.
        seed: of the tokens and groups of each step.
        progress: around the numbers of the parts that are run, `STEPS_AT_ONCE` steps each.
        depths: of a weight in planes, to refine for reading fewer of them in place of skipping.

    Returns:
        The basis, and the losses at the start and at the end of each descent.
    """
    energy = jnp.trace(moments.stream_gradients, axis1=1, axis2=2) / moments.stream.shape[-1]
    plan = [
        ("stream, absolute", _absolute, start.stream, steps[0], (moments.stream, energy)),
        ("stream, skipped", Skipped(depths), start.stream, steps[1], (moments.stream, moments.stream_gradients)),
        ("heads, skipped", SkippedHeads(depths), start.heads, steps[2], (moments.heads, moments.head_gradients)),
    ]
    parts = iter(progress(range(sum(-(-count // STEPS_AT_ONCE) for *_, count, _ in plan))))
    losses: dict[str, Any] = {}
    made = {"stream": start.stream, "heads": start.heads}
    for i, (name, loss, _, count, data) in enumerate(plan):
        which = name.split(",")[0]
        key = jax.random.fold_in(jax.random.fold_in(random_key(seed), 2), i)
        made[which], curve = _descend(loss, made[which], count, learning_rate, key, sparsity, data, parts)
        if len(curve):
            losses[name] = [float(curve[:10].mean()), float(curve[-10:].mean())]
    for _ in parts:
        pass
    return Basis(**made), losses


def _descend(
    loss: Callable[..., Array],
    start: Array,
    steps: int,
    learning_rate: float,
    key: Key[Array, ""],
    sparsity: float,
    data: tuple[Array, ...],
    parts: Iterable[int],
) -> tuple[Array, np.ndarray]:
    """Adam on a skew matrix S; the basis is `start (I + S/2)^-1 (I - S/2)`."""
    skew = jnp.zeros_like(start)
    state = _optimiser(learning_rate, max(steps, 1)).init(skew)
    curve: list[np.ndarray] = []
    for first, _ in zip(range(0, steps, STEPS_AT_ONCE), parts, strict=False):
        count = min(STEPS_AT_ONCE, steps - first)
        skew, state, values = _descend_some(
            loss, learning_rate, steps, count, skew, state, start, key, jnp.int32(first), jnp.float32(sparsity), data
        )
        curve.append(np.asarray(values))
    return _cayley(start, skew), np.concatenate(curve) if curve else np.zeros(0)


def _optimiser(learning_rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _descend_some(
    loss: Callable[..., Array],
    learning_rate: float,
    steps: int,
    count: int,
    skew: Array,
    state: Any,
    start: Array,
    key: Key[Array, ""],
    first: Int[Array, ""],
    sparsity: Float[Array, ""],
    data: tuple[Array, ...],
) -> tuple[Array, Any, Float[Array, " count"]]:
    optimiser = _optimiser(learning_rate, steps)

    def step(carry: tuple[Array, Any], number: Array) -> tuple[tuple[Array, Any], Array]:
        skew, state = carry
        own = jax.random.fold_in(key, number)
        value, gradient = jax.value_and_grad(lambda s: loss(_cayley(start, s), own, sparsity, *data))(skew)
        with jax.numpy_dtype_promotion("standard"):  # Optax takes powers of whole numbers, which a user may forbid
            change, state = optimiser.update(gradient, state)
        return (jnp.add(skew, jnp.asarray(change)), state), value

    (skew, state), values = jax.lax.scan(step, (skew, state), first + jnp.arange(count))
    return skew, state, values


@jax.jit
def _cayley(start: Float[Array, "*batch n n"], free: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    half = (free - jnp.swapaxes(free, -1, -2)) / 2
    eye = jax.lax.broadcast_to_rank(jnp.eye(start.shape[-1]), start.ndim)
    turn = jnp.linalg.solve(eye + half, eye - half)
    return jnp.matmul(start, turn, precision="highest")


def _some(key: Key[Array, ""], groups: int, tokens: int) -> tuple[Array, Array]:
    """Which groups and which tokens a step looks at."""
    first, second = jax.random.split(key)
    chosen = jax.random.permutation(first, groups)[:GROUPS_A_STEP]
    return chosen, jax.random.randint(second, (min(TOKENS_A_STEP, tokens),), 0, tokens)


def _absolute(q: Array, key: Key[Array, ""], sparsity: Array, stream: Array, energy: Array) -> Array:
    groups, tokens = _some(key, *stream.shape[:2])
    weight = jnp.sqrt(energy[groups] / energy.mean())
    rotated = stream[groups][:, tokens] @ q
    return jnp.mean(jnp.abs(rotated) * weight[:, None, None])


@dataclasses.dataclass(frozen=True)
class Skipped:
    """What the stream's readers lose; equal ones share a compiled program."""

    depths: Depths

    def __call__(self, q: Array, key: Key[Array, ""], sparsity: Array, stream: Array, gradients: Array) -> Array:
        groups, tokens = _some(key, *stream.shape[:2])
        own = gradients[groups]
        square = jnp.sum((own @ q) * q[None], axis=1)  # E[u_i^2] in the rotated basis
        lost = jnp.square(stream[groups][:, tokens] @ q) * square[:, None]
        scale = jnp.mean(jnp.trace(gradients, axis1=1, axis2=2))
        return _lost(lost, sparsity, self.depths) / scale


@dataclasses.dataclass(frozen=True)
class SkippedHeads:
    """The same of o, by the bases of the key/value groups."""

    depths: Depths

    def __call__(self, r: Array, key: Key[Array, ""], sparsity: Array, heads: Array, gradients: Array) -> Array:
        blocks, tokens = _some(key, *heads.shape[:2])
        turn, own = r[blocks], gradients[blocks]
        square = jnp.sum(turn * (own @ turn), axis=-2)  # [blocks, kv_heads, head_dim]
        rotated = jnp.einsum("btkqd,bkde->btkqe", heads[blocks][:, tokens], turn)
        lost = jnp.square(rotated) * square[:, None, :, None]
        scale = jnp.mean(jnp.trace(gradients, axis1=-2, axis2=-1))
        return _lost(lost.reshape(len(blocks), len(tokens), -1), sparsity, self.depths) / scale


def _lost(lost: Float[Array, "groups tokens channels"], sparsity: Array, depths: Depths) -> Array:
    """The sum over a token's channels of the share that is lost least, mean over tokens and groups.

    In planes each channel is read to the depth that is worth its bits: what is left of its energy there and the bits,
    at the price that leaves the same share of channels unread, are summed.
    """
    fixed = jax.lax.stop_gradient(lost).reshape(len(lost), -1)
    stride = max(1, fixed.shape[1] // 4096)
    while math.gcd(stride, lost.shape[-1]) > 1:  # or it would meet some channels only
        stride += 1
    few = fixed[:, ::stride]
    edge = jnp.quantile(few, sparsity, axis=1)[:, None, None]
    if not depths:
        return jnp.mean(jnp.sum(jnp.where(jax.lax.stop_gradient(lost) < edge, lost, 0.0), axis=-1))
    price, least = edge * (1 - depths[0].left) / depths[0].bits, lost
    for depth in depths:
        least = jnp.minimum(least, depth.left * lost + price * depth.bits)
    return jnp.mean(jnp.sum(least, axis=-1))
