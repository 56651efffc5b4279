"""The product of listed channels as a Pallas kernel for the Triton backend.

Program (tile, split) walks the lists of its chunks and adds `value * weight row` for one tile of columns: a kept
row's segment is read once, a skipped one never. Partial sums per split avoid atomics, so that results repeat.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.kept import LARGEST_BATCH, Kept
from kernels_pallas.sparse_product.config import Config, valid


def _tile(layer: Any, tile: Any, split: Any, batch: int, config: Config, kept: Any, weight: Any, scale: Any, out: Any):
    """One tile of one layer's columns, for the lists of one split."""
    counts, channels, values = kept
    # A Python integer in an index inside a loop is more than interpret mode understands.
    layer, first = jnp.int32(layer), jnp.int32(0)
    size_out, chunks = weight.shape[1], counts.shape[1]
    columns = tile * config.block_columns + jnp.arange(config.block_columns)
    inside = columns < size_out
    exact = size_out % config.block_columns == 0

    # A step takes `each` entries of every list of the split side by side, so that short lists fill a block.
    each = config.block_rows // config.lists
    entry = jnp.arange(config.block_rows)
    chunk, place = split * config.lists + entry // each, entry % each
    count = plt.load(counts.at[layer, chunk], mask=chunk < chunks, other=0)

    sequence = jnp.arange(LARGEST_BATCH)
    real = sequence < batch

    def listed(step: Any) -> tuple[Any, Any, Any]:
        """The entries of one step: which are taken, their channels, and their values, of one or of all sequences."""
        at = step * each + place
        taken = at < count
        channel = plt.load(channels.at[layer, chunk, at], mask=taken, other=0)
        if batch == 1:
            return taken, channel, plt.load(values.at[layer, chunk, first, at], mask=taken, other=0)
        where = values.at[layer, chunk[None, :], sequence[:, None], at[None, :]]
        return taken, channel, plt.load(where, mask=real[:, None] & taken[None, :], other=0)

    def rows(taken: Any, channel: Any) -> Any:
        mask = jnp.broadcast_to(taken[:, None], (config.block_rows, config.block_columns))
        mask = mask if exact else mask & inside[None, :]
        where = weight.at[channel[:, None], columns[None, :]]
        return plt.load(where, mask=mask, other=0, eviction_policy="evict_first")

    def add(total: Any, read: Any, value: Any) -> Any:
        if batch == 1:
            return total + read.astype(jnp.float32) * value.astype(jnp.float32)[:, None]
        precision = lax.Precision.HIGHEST if value.dtype == jnp.float32 else None
        product = jnp.dot(value, read.astype(value.dtype), precision=precision, preferred_element_type=jnp.float32)
        return total + product

    def step(i: Any, carry: Any) -> Any:
        # The next step's rows and the list after it are in flight while this step's rows are added.
        total, read, value, (taken, channel, next_value) = carry
        next_read = rows(taken, channel)
        return add(total, read, value), next_read, next_value, listed(i + 2)

    steps = pl.cdiv(jnp.max(count), each)
    factor = 1.0 if scale is None else plt.load(scale.at[columns], mask=inside, other=0.0)
    height = config.block_rows if batch == 1 else LARGEST_BATCH
    taken, channel, value = listed(0)
    carry = (jnp.zeros((height, config.block_columns), jnp.float32), rows(taken, channel), value, listed(1))
    total, *_ = lax.fori_loop(0, steps, step, carry)
    if batch == 1:
        total = jnp.sum(total, axis=0) * factor
        plt.store(out.at[split, first, columns], total, mask=None if exact else inside)
        return
    plt.store(out.at[split, sequence[:, None], columns[None, :]], total * factor, mask=real[:, None] & inside[None, :])


def _kernel(*refs: Any, batch: int, config: Config, scaled: tuple[bool, ...]):
    layers = len(scaled)
    kept, refs = refs[:3], refs[3:]
    weights, scales, outs = refs[:layers], list(refs[layers:-layers]), refs[-layers:]
    program, split, first = pl.program_id(0), pl.program_id(1), 0
    for layer in range(layers):
        tiles = pl.cdiv(weights[layer].shape[1], config.block_columns)
        scale = scales.pop(0) if scaled[layer] else None
        arguments = (layer, program - first, split, batch, config, kept, weights[layer], scale, outs[layer])
        if layers == 1:
            _tile(*arguments)
        else:
            pl.when((program >= first) & (program < first + tiles))(functools.partial(_tile, *arguments))
        first += tiles


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def sparse_product_triton(
    kept: Kept, weights: Sequence[jax.Array], scales: Sequence[jax.Array | None], config: Config, interpret: bool
) -> tuple[jax.Array, ...]:
    """See `sparse_product`; one launch for all layers."""
    chunks, batch = kept.chunks, kept.values.shape[2]
    if batch > LARGEST_BATCH:
        raise ValueError(f"batch = {batch}: the kernel takes at most {LARGEST_BATCH} sequences")
    if not valid(config, batch):
        raise ValueError(f"{config} does not fit a batch of {batch}")
    splits = pl.cdiv(chunks, config.lists)
    tiles = sum(pl.cdiv(w.shape[1], config.block_columns) for w in weights)
    present = [s for s in scales if s is not None]
    return tuple(
        pl.pallas_call(
            functools.partial(_kernel, batch=batch, config=config, scaled=tuple(s is not None for s in scales)),
            grid=(tiles, splits),
            out_shape=[jax.ShapeDtypeStruct((splits, batch, w.shape[1]), jnp.float32) for w in weights],
            compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
            interpret=interpret,
            name=f"sparse_product_{weights[0].shape[0]}x{sum(w.shape[1] for w in weights)}",
        )(*kept, *weights, *present)
    )
