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
from kernels_pallas.weight import GROUP, MIDDLE, Weight


def _tile(
    layer: Any,
    tile: Any,
    split: Any,
    batch: int,
    config: Config,
    kind: str,
    kept: Any,
    weight: Any,
    scale: Any,
    out: Any,
) -> None:
    """One tile of one layer's columns, for the lists of one split."""
    counts, channels, values = kept
    # A Python integer in an index inside a loop is more than interpret mode understands.
    layer, first = jnp.int32(layer), jnp.int32(0)
    packed = kind == "int4"
    chunks, size_stored = counts.shape[1], weight.shape[1]
    # Of int4 two to a byte: the even ones and the odd ones are added up by themselves.
    columns_read = config.block_columns // 2 if packed else config.block_columns
    columns = tile * columns_read + jnp.arange(columns_read)
    inside = columns < size_stored
    exact = size_stored % columns_read == 0
    group = tile * config.block_columns // GROUP

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

    def rows(taken: Any, channel: Any) -> list[Any]:
        """The rows as they are stored, and of int4 their scales."""
        mask = jnp.broadcast_to(taken[:, None], (config.block_rows, columns_read))
        mask = mask if exact else mask & inside[None, :]
        where = weight.at[channel[:, None], columns[None, :]]
        read = [plt.load(where, mask=mask, other=0, eviction_policy="evict_first")]
        if packed:
            read.append(plt.load(scale.at[group, channel], mask=taken, other=0))
        return read

    def add(totals: list[Any], read: list[Any], value: Any) -> list[Any]:
        if not packed:
            return [_add(totals[0], read[0], value)]
        wide, factor = read[0].astype(jnp.int32), read[1].astype(jnp.float32)
        halves = [((half & 15) - MIDDLE).astype(jnp.float32) for half in (wide, wide >> 4)]
        if batch == 1:
            value = value.astype(jnp.float32) * factor
        else:
            halves = [half * factor[:, None] for half in halves]
        return [_add(total, half, value) for total, half in zip(totals, halves, strict=True)]

    def step(i: Any, carry: Any) -> Any:
        # The next step's rows and the list after it are in flight while this step's rows are added.
        totals, read, value, (taken, channel, next_value) = carry
        next_read = rows(taken, channel)
        return add(totals, read, value), next_read, next_value, listed(i + 2)

    steps = pl.cdiv(jnp.max(count), each)
    factor = 1.0
    if kind == "int8":
        factor = plt.load(scale.at[columns], mask=inside, other=0.0)
        factor = factor if batch == 1 else factor[None, :]
    height = config.block_rows if batch == 1 else LARGEST_BATCH
    taken, channel, value = listed(0)
    zeros = [jnp.zeros((height, columns_read), jnp.float32)] * (2 if packed else 1)
    totals, *_ = lax.fori_loop(0, steps, step, (zeros, rows(taken, channel), value, listed(1)))
    for half, total in enumerate(totals):
        to = columns * 2 + half if packed else columns
        if batch == 1:
            total = jnp.sum(total, axis=0) * factor
            plt.store(out.at[split, first, to], total, mask=None if exact else inside)
        else:
            where = out.at[split, sequence[:, None], to[None, :]]
            plt.store(where, total * factor, mask=real[:, None] & inside[None, :])


def _add(total: Any, read: Any, value: Any) -> Any:
    """Add value times row: of one sequence `[rows]` row by row, of several `[batch, rows]` as a product."""
    if value.ndim == 1:
        return total + read.astype(jnp.float32) * value.astype(jnp.float32)[:, None]
    precision = lax.Precision.HIGHEST if value.dtype == jnp.float32 else None
    return total + jnp.dot(value, read.astype(value.dtype), precision=precision, preferred_element_type=jnp.float32)


def _kernel(*refs: Any, batch: int, config: Config, kind: str, layers: int):
    kept, refs = refs[:3], refs[3:]
    weights, scales, outs = refs[:layers], refs[layers:-layers], refs[-layers:]
    program, split, first = pl.program_id(0), pl.program_id(1), 0
    for layer in range(layers):
        tiles = pl.cdiv(outs[layer].shape[2], config.block_columns)
        scale = scales[layer] if scales else None
        arguments = (layer, program - first, split, batch, config, kind, kept, weights[layer], scale, outs[layer])
        if layers == 1:
            _tile(*arguments)
        else:
            pl.when((program >= first) & (program < first + tiles))(functools.partial(_tile, *arguments))
        first += tiles


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def sparse_product_triton(
    kept: Kept, weights: Sequence[Weight], config: Config, interpret: bool
) -> tuple[jax.Array, ...]:
    """See `sparse_product`; one launch for all layers."""
    chunks, batch, kind = kept.chunks, kept.values.shape[2], weights[0].kind
    if batch > LARGEST_BATCH:
        raise ValueError(f"batch = {batch}: the kernel takes at most {LARGEST_BATCH} sequences")
    if not valid(config, batch, kind):
        raise ValueError(f"{config} does not fit a batch of {batch} with {kind} weights")
    splits = pl.cdiv(chunks, config.lists)
    tiles = sum(pl.cdiv(w.shape[1], config.block_columns) for w in weights)
    scales = [w.scales for w in weights if w.scales is not None]
    return tuple(
        pl.pallas_call(
            functools.partial(_kernel, batch=batch, config=config, kind=kind, layers=len(weights)),
            grid=(tiles, splits),
            out_shape=[jax.ShapeDtypeStruct((splits, batch, w.shape[1]), jnp.float32) for w in weights],
            compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
            interpret=interpret,
            name=f"sparse_product_{weights[0].shape[0]}x{sum(w.shape[1] for w in weights)}",
        )(*kept, *[w.values for w in weights], *scales)
    )
