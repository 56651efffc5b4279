"""How the blocks of the kernel share the work: all arithmetic that is known before a kernel runs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

LOAD = 16  # bytes that a lane reads of a row at once: a vector of weights
WARP = 32
QUAD = 4  # lanes that share a vector of columns
TURN = 4  # channels that a lane looks at together
SHARED_MEMORY = 227 * 1024  # bytes that one block may have on Hopper
LARGEST_WEIGHT = 2**31  # bytes: offsets of rows are 32 bits wide
MOST_CHANNELS = 2**15  # an entry of a list has 16 bits for the channel, and a count less than that


@dataclasses.dataclass(frozen=True)
class Config:
    """What a tuner may choose; the sizes of a model decide the rest."""

    blocks: int  # of threads, at most one a processor: they wait for each other, so all must run at once
    threads: int = 512
    unroll: int = 1  # times four rows that a lane has on their way, and again as many behind them
    splits_out: int = 8  # into how many partial sums the output projection is split
    splits_down: int = 8
    splits_in: int = 5  # likewise q, k and v
    unit: int = 2  # vectors that a tile's edges are multiples of, where the columns are


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of the kernel: blocks by tiles of columns and splits of the input channels."""

    size_in: int
    sizes_out: tuple[int, ...]  # of layers beside each other: q, k and v
    splits: int
    tiles: tuple[int, ...]  # of each layer
    each: int  # columns of a vector
    unit: int  # vectors that a tile's edge is a multiple of

    @property
    def channels(self) -> int:
        """Input channels of a split."""
        return -(-self.size_in // (self.splits * WARP)) * WARP

    @property
    def widest(self) -> int:
        """Vectors of the widest tile."""
        return max(
            -(-n // (self.each * self.unit * t)) * self.unit for n, t in zip(self.sizes_out, self.tiles, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Shape:
    """Everything about a block that the kernel is compiled for."""

    hidden: int
    intermediate: int
    attended: int  # features of attention: heads times head_dim
    heads: int
    attention_splits: int
    sizes_next: tuple[int, ...]  # columns of the next block's q, k and v; empty after the last block
    item: int  # bytes of a weight
    eps: float
    biases: tuple[str, ...]  # layers of o, gate, up and down that have one


def cut(size_in: int, sizes_out: tuple[int, ...], splits: int, blocks: int, item: int, unit: int = 2) -> Product:
    """Share the columns of the layers among the blocks of one split, the widest tiles as narrow as they can be."""
    each = LOAD // item
    channels = -(-size_in // (splits * WARP)) * WARP
    splits = -(-size_in // channels)  # splits of whole warps may be fewer
    vectors = [n // each for n in sizes_out]
    if any(v % unit for v in vectors):
        unit = 1
    counts = [1] * len(vectors)
    units = [v // unit for v in vectors]
    for _ in range(blocks // splits - len(vectors)):
        widest = max(range(len(units)), key=lambda i: -(-units[i] // counts[i]))
        if units[widest] <= counts[widest]:
            break
        counts[widest] += 1
    return Product(size_in, sizes_out, splits, tuple(counts), each, unit)


@functools.cache
def products(shape: Shape, config: Config) -> dict[str, Product]:
    """The products of the kernel by input group; gate and up are one, whose tiles have the same columns of both."""
    make = functools.partial(cut, blocks=config.blocks, item=shape.item, unit=config.unit)
    found = {
        "attn_out": make(shape.attended, (shape.hidden,), config.splits_out),
        "mlp_in": make(shape.hidden, (shape.intermediate,), 1),
        "mlp_mid": make(shape.intermediate, (shape.hidden,), config.splits_down),
    }
    if shape.sizes_next:
        found["attn_in"] = make(shape.hidden, shape.sizes_next, config.splits_in)
    return found


PHASES = ("attn_out", "mlp_in", "mlp_mid", "attn_in")  # in their order; the last one is missing after the last block
COUNTED = {"attn_out": 0, "mlp_in": 1, "mlp_mid": 3, "attn_in": 4}  # rows of the counts: o, gate, up, down, q, k, v


class Task(NamedTuple):
    """What one block of threads does in one phase, as the kernel reads it: integers, four at a time."""

    working: int  # 1, or 0 if the block has no part of the product
    first_channel: int
    channels: int
    lists: int  # 2 for gate and up
    width: int  # vectors of the tile
    rows: int  # in which fours of lanes stand over the tile
    columns: int  # of the tile
    first_column: int
    stride: int  # bytes of a row of the weight
    layer: int  # of q, k and v
    count: int  # where the length of the list is noted
    counts: int  # 1 if this block notes it
    out: int  # where the partial sums of the split begin
    normed: int  # 1 if the input is the normed stream
    size_in: int
    unused: int = 0


def tasks(shape: Shape, config: Config) -> np.ndarray:
    """Every block's tasks: int32 `[blocks, phases, fields]`."""
    found = []
    for block in range(config.blocks):
        for group, p in products(shape, config).items():
            split, tile = divmod(block, sum(p.tiles))
            layer = 0
            while tile >= p.tiles[layer]:
                tile -= p.tiles[layer]
                layer += 1
            size, units = p.sizes_out[layer], p.sizes_out[layer] // (p.each * p.unit)
            low, high = (units * (tile + k) // p.tiles[layer] * p.unit for k in (0, 1))
            start = split * p.channels
            working = split < p.splits
            found.append(
                Task(
                    working=int(working),
                    first_channel=start,
                    channels=min(p.channels, p.size_in - start),
                    lists=2 if group == "mlp_in" else 1,
                    width=high - low,
                    rows=config.threads // QUAD // (high - low),
                    columns=(high - low) * p.each,
                    first_column=low * p.each,
                    stride=size * shape.item,
                    layer=layer,
                    count=(COUNTED[group] + layer) * most_splits(shape, config) + split,
                    counts=int(tile == 0),
                    out=split * size,
                    normed=int(group in ("mlp_in", "attn_in")),
                    size_in=p.size_in,
                )
            )
    return np.array(found, np.int32).reshape(config.blocks, -1, len(Task._fields))


def most_splits(shape: Shape, config: Config) -> int:
    """Of any product."""
    return max(p.splits for p in products(shape, config).values())


@dataclasses.dataclass(frozen=True)
class Room:
    """Where things are in shared memory, in bytes, and in the exchange, in posts of 8 bytes."""

    lists: int  # of kept channels
    capacity: int  # entries of a list
    turns: int  # fours of channels that a lane looks at
    counts: int  # of kept channels, of each turn and warp
    sums: int  # of the lanes
    terms: int  # of the stream's channels, or of columns of gate and up
    warps: int  # one word a warp
    largest: int  # likewise
    merged: int  # values of attention
    stream: int  # the block's own channels of it
    tasks: int
    shared: int  # bytes in all
    own: int  # channels of the stream that a block adds up
    own_lanes: int  # lanes that do, whole warps
    squares: int  # sums of squares that are posted
    exchange: dict[str, int]  # where each part of the exchange begins
    posts: int  # of the exchange in all


@functools.cache
def room(shape: Shape, config: Config) -> Room:
    """Lay out shared memory and the exchange."""
    cuts = products(shape, config)
    warps = config.threads // WARP
    capacity = max(p.channels for p in cuts.values())
    turns = -(-capacity // (TURN * config.threads))
    own = -(-shape.hidden // (2 * config.blocks)) * 2
    own_lanes = -(-own // WARP) * WARP
    sizes = {
        "lists": 4 * max(capacity, 2 * cuts["mlp_in"].channels),  # gate and up have a list each
        "counts": 4 * -(-turns * warps // WARP) * WARP,
        "sums": 4 * 2 * config.threads // QUAD * LOAD // shape.item,
        "terms": 4 * config.threads,
        "warps": 4 * warps,
        "largest": 4 * warps,
        "merged": 4 * cuts["attn_out"].channels,
        "stream": 4 * own_lanes,
        "tasks": 4 * len(PHASES) * len(Task._fields),
    }
    at, shared = {}, 0
    for name, size in sizes.items():
        at[name] = shared
        shared += -(-size // LOAD) * LOAD
    squares = -(-shape.hidden // own) * own_lanes // WARP
    parts = {
        "out": cuts["attn_out"].splits * shape.hidden,
        "middle": shape.hidden // 2,
        "middle squares": squares,
        "gated": shape.intermediate // 2,
        "down": cuts["mlp_mid"].splits * shape.hidden,
        "stream": shape.hidden // 2,
        "stream squares": squares,
    }
    exchange, posts = {}, 0
    for name, size in parts.items():
        exchange[name] = posts
        posts += -(-size // LOAD) * LOAD
    return Room(
        **at, capacity=capacity, turns=turns, shared=shared, own=own, own_lanes=own_lanes, squares=squares,
        exchange=exchange, posts=posts,
    )  # fmt: skip


def problem(shape: Shape, config: Config, batch: int, weights: DTypeLike, activations: DTypeLike) -> str | None:
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


ATTENTION_PART = 9000  # bytes that a partial sum of q, k and v costs the attention, which adds many in each program


def heuristic(shape: Shape, blocks: int) -> Config:
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
    return Config(
        blocks=blocks,
        unit=2 if widest[1] <= widest[0] else 1,
        splits_out=splits(shape.attended, (shape.hidden,)),
        splits_down=splits(shape.intermediate, (shape.hidden,)),
        splits_in=splits(shape.hidden, shape.sizes_next, ATTENTION_PART) if shape.sizes_next else 1,
    )
