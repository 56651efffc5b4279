"""Which configuration of the fused block runs: a tuned one, or a heuristic's; and what cannot run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.fused_block.layout import (
    LARGEST_WEIGHT,
    LOAD,
    MOST_CHANNELS,
    QUAD,
    SHARED_MEMORY,
    TURN,
    WARP,
    FusedConfig,
    FusedShape,
    cut,
    products,
    room,
)
from kernels_pallas.tuned import tuned


def problem(
    shape: FusedShape, config: FusedConfig, batch: int, weights: DTypeLike, activations: DTypeLike
) -> str | None:
    """Why the kernel cannot run such a block, if it cannot."""
    name = jnp.dtype(weights).name
    if jnp.dtype(activations) != jnp.bfloat16 or name not in ("bfloat16", "int8"):
        return f"takes activations in bfloat16 and weights in bfloat16 or int8, found {activations} and {name}"
    if batch != 1:
        return f"takes one sequence, found {batch}"
    each = LOAD // shape.item
    columns = (shape.hidden, shape.intermediate, *shape.sizes_next)
    if any(n % each for n in columns):
        return f"takes columns in multiples of {each}, found {list(columns)}"
    if shape.attended % (shape.heads * TURN):
        return f"takes heads of a multiple of {TURN} features, found {shape.heads} in {shape.attended} features"
    splits = (config.splits_out, config.splits_down, config.splits_in)
    if max(splits) * max(1, len(shape.sizes_next)) > config.blocks or config.threads % WARP:
        return f"{config}: expected a block for every split and layer, and whole warps"
    cuts, where = products(shape, config), room(shape, config)
    for group, p in cuts.items():
        wide = p.widest * each * (2 if group == "mlp_in" else 1)
        if wide > config.threads or p.widest > config.threads // QUAD:
            return f"{config}: {group} has tiles of {wide} columns, more than there are threads"
        if p.size_in * max(p.sizes_out) * shape.item >= LARGEST_WEIGHT:
            return f"{group} has a weight of {LARGEST_WEIGHT} bytes or more"
        if p.size_in % 8 or p.size_in > MOST_CHANNELS:
            return f"takes inputs in multiples of 8, at most {MOST_CHANNELS}, found {p.size_in} of {group}"
    if max(config.splits_out, config.splits_down) * where.own_lanes > config.threads:
        return f"{config}: {where.own} channels of the stream a block need fewer splits"
    if where.squares > config.threads:
        return f"{config}: {where.squares} sums of squares need more threads"
    if where.shared > SHARED_MEMORY:
        return f"{config} needs {where.shared} bytes of shared memory, more than {SHARED_MEMORY}"
    return None


def config_for(shape: FusedShape, blocks: int, device: str | None = None) -> FusedConfig:
    """The tuned configuration of the device for a block of such weights, or the heuristic's.

    Args:
        shape: of the block.
        blocks: at most one a processor of the device.
        device: `jax.Device.device_kind`; None is the default device.
    """
    found = tuned(device, "mosaic").get(shape_key(shape))
    # Blocks that do not all run at once would wait for each other without end.
    return heuristic(shape, blocks) if found is None or found["blocks"] > blocks else FusedConfig(**found)


def shape_key(shape: FusedShape) -> str:
    """How a shape is named in the files of tuned values: the last block has no q, k and v, and the same values."""
    return f"{shape.attended}-{shape.hidden}-{shape.intermediate} bytes {shape.item}"


def search_space(shape: FusedShape, blocks: int, weights: DTypeLike) -> Iterator[FusedConfig]:
    """The configurations that a tuner tries."""
    for out, down, inputs in itertools.product((4, 6, 8, 11, 16), (4, 6, 8, 11, 16), (4, 5, 7, 9, 11)):
        for unit, unroll in itertools.product((1, 2), (1, 2)):
            config = FusedConfig(
                blocks, unroll=unroll, splits_out=out, splits_down=down, splits_in=inputs, unit=unit
            )  # fmt: skip
            if problem(shape, config, 1, weights, jnp.bfloat16) is None:
                yield config


ATTENTION_PART = 9000  # bytes that a partial sum of q, k and v costs the attention, which adds many in each program


def heuristic(shape: FusedShape, blocks: int) -> FusedConfig:
    """Splits that leave few blocks idle and tiles of about 512 bytes, where the sizes allow that."""
    own_lanes = -(-math.ceil(shape.hidden / blocks) // WARP) * WARP
    each = LOAD // shape.item
    most = max(1, min(16, 512 // own_lanes, blocks // 4))

    def splits(size_in: int, sizes_out: Sequence[int], part: int = 1500) -> int:
        def cost(n: int) -> float:
            p = cut(size_in, tuple(sizes_out), n, blocks, shape.item)
            # What the busiest block reads, short pieces of rows being dear, and what a partial sum costs later.
            return p.channels * (p.widest * LOAD + 128) / 2 + part * n

        fitting = [
            n
            for n in range(1, most + 1)
            if blocks // n >= len(sizes_out)
            and cut(size_in, tuple(sizes_out), n, blocks, shape.item).widest * each <= 512
        ]
        return min(fitting, key=cost) if fitting else 1

    # Edges on sectors of 32 bytes, unless that makes the widest tile of gate and up wider.
    widest = [cut(shape.hidden, (shape.intermediate,), 1, blocks, shape.item, unit).widest for unit in (1, 2)]
    return FusedConfig(
        blocks=blocks,
        unit=2 if widest[1] <= widest[0] else 1,
        splits_out=splits(shape.attended, (shape.hidden,)),
        splits_down=splits(shape.intermediate, (shape.hidden,)),
        splits_in=splits(shape.hidden, shape.sizes_next, ATTENTION_PART) if shape.sizes_next else 1,
    )
