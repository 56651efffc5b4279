"""Which configuration of the fused block runs: a tuned one, or a heuristic's; and what cannot run."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.formats import FORMATS
from kernels_pallas.fused_block.memory_layout import memory_layout
from kernels_pallas.fused_block.tiling import (
    LARGEST_WEIGHT,
    LOAD,
    MOST_CHANNELS,
    MOST_SETS,
    QUAD,
    QUERIES,
    SET,
    SHARED_MEMORY,
    WARP,
    FusedConfig,
    FusedShape,
    cut,
    products,
    sets,
)
from kernels_pallas.tuned import tuned

HEAD_DIMS = (32, 64, 128)


def problem(shape: FusedShape, config: FusedConfig, batch: int, activations: DTypeLike) -> str | None:
    """Why the kernel cannot run such a block, if it cannot."""
    if jnp.dtype(activations) != jnp.bfloat16 or shape.format.multiplied is None:
        *most, last = (name for name, one in FORMATS.items() if one.multiplied is not None)
        kinds = f"{', '.join(most)} or {last}"
        return f"takes activations in bfloat16 and weights in {kinds}, found {activations} and {shape.kind}"
    if batch != 1:
        return f"takes one sequence, found {batch}"
    each = shape.each
    columns = (shape.hidden, shape.intermediate, *shape.sizes_in)
    if any(n % each for n in columns):
        return f"takes columns in multiples of {each}, found {list(columns)}"
    if shape.head_dim not in HEAD_DIMS or shape.heads % shape.kv_heads:
        return f"takes heads of {HEAD_DIMS} features, as many to a key head, found {shape}"
    if shape.group > min(QUERIES, config.threads // WARP):
        return f"{config}: takes at most {QUERIES} queries to a key head and one a warp, found {shape.group}"
    if 0 < len({"q", "k", "v"} & set(shape.biases)) < 3:
        return f"takes biases of q, k and v or of none of them, found {list(shape.biases)}"
    splits = (config.splits_in * len(shape.sizes_in), config.splits_out, config.splits_down)
    if max(splits) > config.ctas or config.threads % (2 * WARP):
        return f"{config}: expected a CTA for every split and layer, and an even number of warps"
    if shape.kv_heads * config.attention_splits > config.ctas:
        return f"{config}: expected a CTA for every key head and split, found {shape.kv_heads} key heads"
    cuts, where = products(shape, config), memory_layout(shape, config)
    for group, p in cuts.items():
        layers = 2 if group == "mlp_in" else 1
        wide = p.widest * each * layers
        if wide > config.threads or -(-p.widest // SET) * SET * layers > config.threads // QUAD:
            return f"{config}: {group} has tiles of {wide} columns, more than there are threads"
        if sets(shape, p) > MOST_SETS:
            return f"{config}: {group} has tiles of {wide} columns, more than {MOST_SETS} scales a row"
        if p.size_in * max(p.sizes_out) * shape.bits // 8 >= LARGEST_WEIGHT:
            return f"{group} has a weight of {LARGEST_WEIGHT} bytes or more"
        if p.size_in % 8 or p.size_in > MOST_CHANNELS:
            return f"takes inputs in multiples of 8, at most {MOST_CHANNELS}, found {p.size_in} of {group}"
    if max(config.splits_out, config.splits_down) * where.own_lanes > config.threads:
        return f"{config}: {where.own} channels of the stream a CTA need fewer splits"
    if where.squares > config.threads:
        return f"{config}: {where.squares} sums of squares need more threads"
    if where.shared > SHARED_MEMORY:
        return f"{config} needs {where.shared} bytes of shared memory, more than {SHARED_MEMORY}"
    return None


def config_for(shape: FusedShape, ctas: int, slots: int, device: str | None = None) -> FusedConfig:
    """The tuned configuration of the device for a block of such weights, or the heuristic's.

    Args:
        shape: of the block.
        ctas: at most one a multiprocessor of the device.
        slots: of the cache.
        device: `jax.Device.device_kind`; None is the default device.
    """
    found = tuned(device, "mosaic").get(shape_key(shape))
    # CTAs that do not all run at once would wait for each other without end.
    if found is None or found["ctas"] > ctas:
        return heuristic(shape, ctas, slots)
    return dataclasses.replace(FusedConfig(**found), attention_splits=attention_splits(shape, ctas, slots))


def attention_splits(shape: FusedShape, ctas: int, slots: int) -> int:
    """Parts of the slots: more of a longer cache, as each has to be read, and its own part merged."""
    return max(1, min(8 if slots <= LONG_CACHE else 16, ctas // shape.kv_heads))


def shape_key(shape: FusedShape) -> str:
    """How a shape is named in the files of tuned values."""
    heads = f"{shape.heads}-{shape.kv_heads}-{shape.head_dim}"
    return f"{shape.hidden}-{shape.intermediate} heads {heads} {shape.kind}"


def search_space(shape: FusedShape, ctas: int) -> Iterator[FusedConfig]:
    """The configurations that a tuner tries."""
    for out, down, inputs in itertools.product((4, 6, 8, 11, 16), (4, 6, 8, 11, 16), (4, 5, 7, 9, 11)):
        config = FusedConfig(
            ctas, splits_out=out, splits_down=down, splits_in=inputs,
            attention_splits=attention_splits(shape, ctas, LONG_CACHE),
        )  # fmt: skip
        if problem(shape, config, 1, jnp.bfloat16) is None:
            yield config


ATTENTION_PART = 9000  # bytes that a partial sum of q, k and v costs the attention, where each lane adds some
LONG_CACHE = 1024  # slots


def heuristic(shape: FusedShape, ctas: int, slots: int) -> FusedConfig:
    """Splits that leave few CTAs idle and tiles of about 512 bytes, where the sizes allow that."""
    own_lanes = -(-math.ceil(shape.hidden / ctas) // WARP) * WARP
    widest = 512 // shape.each if shape.format.group is None else MOST_SETS * SET
    most = max(1, min(16, 512 // own_lanes, ctas // 4))

    def splits(size_in: int, sizes_out: Sequence[int], part: int = 1500) -> int:
        def cost(n: int) -> float:
            p = cut(size_in, tuple(sizes_out), n, ctas, shape.kind)
            # What the busiest CTA reads, short pieces of rows being dear, and what a partial sum costs later.
            return p.channels * (p.widest * LOAD + 128) / 2 + part * n

        fitting = [
            n
            for n in range(1, most + 1)
            if ctas // n >= len(sizes_out) and cut(size_in, tuple(sizes_out), n, ctas, shape.kind).widest <= widest
        ]
        return min(fitting, key=cost) if fitting else 1

    return FusedConfig(
        ctas=ctas,
        splits_out=splits(shape.attended, (shape.hidden,)),
        splits_down=splits(shape.intermediate, (shape.hidden,)),
        splits_in=splits(shape.hidden, shape.sizes_in, ATTENTION_PART),
        attention_splits=attention_splits(shape, ctas, slots),
    )
