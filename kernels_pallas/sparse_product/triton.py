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

from kernels_pallas.formats import Format
from kernels_pallas.formats.base import GROUP
from kernels_pallas.kept import LARGEST_BATCH, Kept
from kernels_pallas.sparse_product.config import Config, plane_config, valid
from kernels_pallas.weight import Weight


def _tile(
    layer: Any,
    tile: Any,
    split: Any,
    batch: int,
    config: Config,
    form: Format,
    kept: Any,
    weight: Any,
    scale: Any,
    out: Any,
    part: Any,
) -> None:
    """One tile of one layer's columns, for the lists of one split, whose sums are a part of `out`."""
    counts, channels, values = kept
    # A Python integer in an index inside a loop is more than interpret mode understands.
    layer, first = jnp.int32(layer), jnp.int32(0)
    chunks, size_stored = counts.shape[1], weight.shape[1]
    # Of several to a stored number, those of each place in it are added up by themselves.
    columns_read = config.block_columns // form.packed
    columns = tile * columns_read + jnp.arange(columns_read)
    inside = columns < size_stored
    exact = size_stored % columns_read == 0
    # Groups of columns with scales of their own: a tile is in one of them, or holds several.
    groups = [] if form.group is None else list(range(max(1, config.block_columns // form.group)))

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
        """The rows as they are stored, and their scales if rows have some."""
        mask = jnp.broadcast_to(taken[:, None], (config.block_rows, columns_read))
        mask = mask if exact else mask & inside[None, :]
        where = weight.at[channel[:, None], columns[None, :]]
        read = [plt.load(where, mask=mask, other=0, eviction_policy="evict_first")]
        for group in groups:
            at = tile * config.block_columns // form.group + group
            real = taken if len(groups) == 1 else taken & (at < scale.shape[0])
            read.append(plt.load(scale.at[at, channel], mask=real, other=0))
        return read

    def by_column(values: list[Any]) -> Any:
        """Of the values of each group's scale, those of each column."""
        wide = values[0][:, None]
        for group, own in enumerate(values[1:], 1):
            behind = jnp.arange(columns_read) >= group * (GROUP // form.packed)
            wide = jnp.where(behind[None, :], own[:, None], wide)
        return wide

    def add(totals: list[Any], read: list[Any], value: Any) -> list[Any]:
        numbers = form.unpack(read[0])
        if groups:
            numbers = [one.astype(jnp.float32) for one in numbers]
            factors = [scales.astype(jnp.float32) for scales in read[1:]]
            factors = factors if form.step == 1 else [factor * form.step for factor in factors]
            if batch == 1:
                value = by_column([value.astype(jnp.float32) * factor for factor in factors])
            else:
                factor = by_column(factors)
                numbers = [one * factor for one in numbers]
        return [_add(total, one, value, batch) for total, one in zip(totals, numbers, strict=True)]

    def step(i: Any, carry: Any) -> Any:
        # The next step's rows and the list after it are in flight while this step's rows are added.
        totals, read, value, (taken, channel, next_value) = carry
        next_read = rows(taken, channel)
        return add(totals, read, value), next_read, next_value, listed(i + 2)

    steps = pl.cdiv(jnp.max(count), each)
    factor = 1.0
    if form.column_scales:
        factor = plt.load(scale.at[columns], mask=inside, other=0.0)
        factor = factor if batch == 1 else factor[None, :]
    height = config.block_rows if batch == 1 else LARGEST_BATCH
    taken, channel, value = listed(0)
    zeros = [jnp.zeros((height, columns_read), jnp.float32)] * form.packed
    totals, *_ = lax.fori_loop(0, steps, step, (zeros, rows(taken, channel), value, listed(1)))
    for k, total in enumerate(totals):
        to = columns * form.packed + k if form.packed > 1 else columns
        if batch == 1:
            total = jnp.sum(total, axis=0) * factor
            plt.store(out.at[part, first, to], total, mask=None if exact else inside)
        else:
            where = out.at[part, sequence[:, None], to[None, :]]
            plt.store(where, total * factor, mask=real[:, None] & inside[None, :])


def _add(total: Any, read: Any, value: Any, batch: int) -> Any:
    """Add value times row: of one sequence row by row, `[rows]` or by column too; of several as a product."""
    if batch == 1:
        value = value if value.ndim == 2 else value.astype(jnp.float32)[:, None]
        return total + read.astype(jnp.float32) * value
    precision = lax.Precision.HIGHEST if value.dtype == jnp.float32 else None
    return total + jnp.dot(value, read.astype(value.dtype), precision=precision, preferred_element_type=jnp.float32)


def _kernel(*refs: Any, batch: int, config: Config, form: Format, layers: int):
    planes = len(form.row_forms)
    kept, refs = refs[:3], refs[3:]
    weights, scales, outs = refs[: layers * planes], refs[layers * planes : -layers], refs[-layers:]
    program, split, first, chunks = pl.program_id(0), pl.program_id(1), 0, kept[0].shape[1]
    for layer in range(layers):
        part, scale, out = 0, scales[layer] if scales else None, outs[layer]
        for plane, rows in enumerate(form.row_forms):
            own, number = plane_config(config, form, plane), layer * planes + plane
            tiles, splits = pl.cdiv(out.shape[2], own.block_columns), pl.cdiv(chunks, own.lists)
            arguments = (number, program - first, split, batch, own, rows, kept, weights[number], scale, out)
            run = functools.partial(_tile, *arguments, split + part if part else split)
            if layers * planes == 1:
                run()
            else:
                here = (program >= first) & (program < first + tiles)
                pl.when(here if plane == 0 else here & (split < splits))(run)
            first, part = first + tiles, part + splits


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def sparse_product_triton(
    kept: Kept, weights: Sequence[Weight], config: Config, interpret: bool
) -> tuple[jax.Array, ...]:
    """See `sparse_product`; one launch for all layers."""
    chunks, batch, form = kept.chunks, kept.values.shape[2], weights[0].format
    if batch > LARGEST_BATCH:
        raise ValueError(f"batch = {batch}: the kernel takes at most {LARGEST_BATCH} sequences")
    if not valid(config, batch, form.name):
        raise ValueError(f"{config} does not fit a batch of {batch} with {form.name} weights")
    cuts = [plane_config(config, form, plane) for plane in range(len(form.row_forms))]
    splits = [pl.cdiv(chunks, cut.lists) for cut in cuts]
    tiles = sum(pl.cdiv(w.shape[1], cut.block_columns) for w in weights for cut in cuts)
    scales = [w.scales for w in weights if w.scales is not None]
    return tuple(
        pl.pallas_call(
            functools.partial(_kernel, batch=batch, config=config, form=form, layers=len(weights)),
            grid=(tiles, splits[0]),
            out_shape=[jax.ShapeDtypeStruct((sum(splits), batch, w.shape[1]), jnp.float32) for w in weights],
            compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
            interpret=interpret,
            name=f"sparse_product_{weights[0].shape[0]}x{sum(w.shape[1] for w in weights)}",
        )(*kept, *jax.tree.leaves([w.values for w in weights]), *scales)
    )
