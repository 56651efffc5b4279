"""How the blocks of the kernel share the work: all arithmetic that is known before a kernel runs."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

LOAD = 16  # bytes that a lane reads of a row at once: a vector of weights
WARP = 32
QUAD = 4  # lanes that share a vector of columns
TURN = 4  # channels that a lane looks at together
SHARED_MEMORY = 227 * 1024  # bytes that one block may have on Hopper
LARGEST_WEIGHT = 2**31  # bytes: offsets of rows are 32 bits wide
MOST_CHANNELS = 2**15  # an entry of a list has 16 bits for the channel, and a count less than that


@dataclasses.dataclass(frozen=True)
class FusedConfig:
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
class FusedShape:
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
def products(shape: FusedShape, config: FusedConfig) -> dict[str, Product]:
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
    note: int  # where the length of the list is noted
    notes: int  # 1 if this block notes it
    out: int  # where the partial sums of the split begin
    normed: int  # 1 if the input is the normed stream
    size_in: int
    unused: int = 0


def tasks(shape: FusedShape, config: FusedConfig) -> np.ndarray:
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
                    note=(COUNTED[group] + layer) * most_splits(shape, config) + split,
                    notes=int(tile == 0),
                    out=split * size,
                    normed=int(group in ("mlp_in", "attn_in")),
                    size_in=p.size_in,
                )
            )
    return np.array(found, np.int32).reshape(config.blocks, -1, len(Task._fields))


def most_splits(shape: FusedShape, config: FusedConfig) -> int:
    """Of any product."""
    return max(p.splits for p in products(shape, config).values())


@dataclasses.dataclass(frozen=True)
class Room:
    """Where things are in shared memory, in bytes, and in the exchange, in posts of 8 bytes."""

    lists: int  # of kept channels
    second: int  # entries after which the list of up begins
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
def room(shape: FusedShape, config: FusedConfig) -> Room:
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
        **at, second=cuts["mlp_in"].channels, turns=turns, shared=shared, own=own, own_lanes=own_lanes, squares=squares,
        exchange=exchange, posts=posts,
    )  # fmt: skip
