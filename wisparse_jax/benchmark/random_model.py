"""Models of true shapes with random weights, for benchmarks: weights, a full cache, and thresholds that really skip."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Float64

from kernels_pallas.weight import Weight
from wisparse_jax.calibration.statistics import GROUP_OF
from wisparse_jax.models.config import INPUT_GROUPS, LAYERS, LlamaConfig
from wisparse_jax.models.forward import BlockCache, Cache, Params, head, hidden_states, layout
from wisparse_jax.models.mesh import param_shardings, place_on
from wisparse_jax.models.parameters import flat, param_shapes
from wisparse_jax.models.quantise import quantise_params
from wisparse_jax.models.rules import Thresholds, rules_of
from wisparse_jax.sparsity import SparsityPlan

CALIBRATION_STEPS, ROUNDS = 16, 3


def random_params(config: LlamaConfig, dtype: str, mesh: Mesh | None = None, weights: str | None = None) -> Params:
    """Weights with standard deviation 0.02, norms of ones, made tensor by tensor, on a mesh in their parts.

    With a kind of `weights` every block is rounded when it is made, so that memory holds the rounded model and a block.
    """
    shapes = param_shapes(config, dtype)
    shardings = None if mesh is None else flat(param_shardings(config, shapes, mesh))
    numbers = {path: i for i, path in enumerate(flat(shapes))}

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def normal(key: jax.Array, shape: tuple[int, ...], sharding: NamedSharding | None) -> jax.Array:
        out = jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)
        return out if sharding is None else lax.with_sharding_constraint(out, sharding)

    def made(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        sharding = None if shardings is None else shardings[path]
        if len(leaf.shape) == 2:
            return normal(jax.random.key(numbers[path]), leaf.shape, sharding)
        same = np.full(leaf.shape, 0.0 if "bias" in path else 1.0, leaf.dtype)
        return jnp.asarray(same) if sharding is None else jax.device_put(same, sharding)

    def all_of(part: Params, prefix: str = "") -> Params:
        leaves = [made(prefix + path, leaf) for path, leaf in flat(part).items()]
        return jax.tree.unflatten(jax.tree.structure(part), leaves)

    params = all_of({name: leaf for name, leaf in shapes.items() if name != "blocks"}) | {"blocks": []}
    for b, block in enumerate(shapes["blocks"]):
        own = {"blocks": [all_of(block, f"blocks.{b}.")]}
        params["blocks"] += quantise_params(own, weights)["blocks"]
    return place_on(mesh, config, params)


def with_biases(params: Params) -> Params:
    """The same weights, with a random bias in every layer of every block that has none, as a plan's are merged in."""

    def biased(number: int, layer: Params) -> Params:
        size = Weight.of(layer).shape[1]
        made = 0.01 * jax.random.normal(jax.random.key(number), (size,), params["embed"].dtype)
        return {"bias": made} | layer

    blocks = [
        block | {name: biased(len(LAYERS) * b + i, block[name]) for i, name in enumerate(LAYERS)}
        for b, block in enumerate(params["blocks"])
    ]
    return params | {"blocks": blocks}


def random_cache(
    config: LlamaConfig, batch: int, slots: int, dtype: Any, sharding: NamedSharding | None = None
) -> Cache:
    """Keys and values of unit variance."""
    shape = (batch, slots, config.num_kv_heads, config.head_dim)
    make = jax.jit(lambda i: jax.random.normal(jax.random.key(i), shape, dtype), out_shardings=sharding)
    return [BlockCache(make(2 * b), make(2 * b + 1)) for b in range(config.num_blocks)]


def calibrated(
    config: LlamaConfig,
    params: Params,
    cache: Cache,
    context: int,
    batch: int,
    shares: float | Float64[np.ndarray, "blocks 7 *planes"],
) -> Thresholds:
    """One threshold per layer, or plane: the quantile of the inputs while decoding sparsely, found in a few rounds.

    Args:
        config: of the model.
        params: its weights, in planes where shares are given for each.
        cache: filled up to the context.
        context: positions before the first step.
        batch: sequences.
        shares: of the channels that a layer, or a plane of it, does not read; one number stands for all layers.
    """
    step = _calibration_step(config, batch)
    table = np.asarray(shares, np.float32)
    table = np.broadcast_to(table, (config.num_blocks, len(LAYERS))) if table.ndim == 0 else table
    # No plane is read without those above it.
    table = np.maximum.accumulate(table, axis=2) if table.ndim == 3 else table
    # A threshold of 0 keeps every channel: the first round is dense.
    thresholds = [{n: jnp.zeros(config.layer_shapes[n][0]) for ns in INPUT_GROUPS.values() for n in ns}]
    thresholds *= config.num_blocks
    for _ in range(ROUNDS):
        tokens, state = jnp.arange(5, 5 + batch, dtype=jnp.int32), cache
        seen: list[list[dict[str, jax.Array]]] = []
        for i in range(CALIBRATION_STEPS):
            tokens, state, inputs = step(params, tokens, jnp.int32(context + i), state, thresholds)
            seen.append(inputs)
        thresholds = []
        for b in range(config.num_blocks):
            read = {g: jnp.stack([s[b][g] for s in seen]) for g in INPUT_GROUPS}
            shared = {n: jnp.quantile(read[GROUP_OF[n]], jnp.asarray(table[b, i])) for i, n in enumerate(LAYERS)}
            thresholds.append(
                {n: _for_all_channels(threshold, config.layer_shapes[n][0]) for n, threshold in shared.items()}
            )
    return thresholds


def _for_all_channels(thresholds: Float[Array, "*planes"], channels: int) -> Float[Array, "*planes in_channels"]:
    """The thresholds of every channel."""
    return jnp.broadcast_to(thresholds[..., None], (*thresholds.shape, channels))


def spread_shares(plan: SparsityPlan, blocks: int) -> Float64[np.ndarray, "blocks 7 *planes"]:
    """What a plan does not read of each layer, or of each of its planes, spread over another number of blocks.

    A block gets the shares of the plan's block at the same relative depth.
    """
    if plan.planes is not None:
        shares = plan.planes.skipped(plan.layer_weights, plan.target)
    else:
        shares = plan.sparsities if plan.realised is None else plan.realised
    return shares[((np.arange(blocks) + 0.5) * len(shares) / blocks).astype(int)]


@functools.cache
def _calibration_step(config: LlamaConfig, batch: int) -> Callable[..., Any]:
    start = jnp.zeros(batch, jnp.int32)

    @jax.jit
    def step(
        params: Params, tokens: jax.Array, slot: jax.Array, cache: Cache, thresholds: Thresholds
    ) -> tuple[jax.Array, Cache, list[dict[str, jax.Array]]]:
        records: list[dict[str, Any]] = []
        where = layout(config, batch, 1, slot, start)
        hidden, cache = hidden_states(config, params, tokens[:, None], where, cache, rules_of(thresholds), records)
        inputs = [{g: jnp.abs(r[names[0]]).astype(jnp.float32) for g, names in INPUT_GROUPS.items()} for r in records]
        return jnp.argmax(head(params, hidden[:, 0]), -1).astype(jnp.int32), cache, inputs

    return step
