"""The layout of a CTA's shared memory, and of the exchange, the mailboxes between CTAs."""

from __future__ import annotations

import dataclasses
import functools

from kernels_pallas.fused_block.tiling import (
    ATTENDING,
    CHANNELS_AT_ONCE,
    LOAD,
    PADDED,
    PHASES,
    QUAD,
    QUERIES,
    WARP,
    FusedConfig,
    FusedShape,
    Task,
    block_arrays,
    products,
    sets,
)
from kernels_pallas.fused_block.tiling import lists as lists_of


@dataclasses.dataclass(frozen=True)
class MemoryLayout:
    """Where things are in shared memory, in bytes, and in the exchange, in mailboxes of 8 bytes."""

    lists: int  # of kept channels
    second: int  # entries after which the list of up begins
    rounds: int  # in which lanes take their channels, four at once
    counts: int  # of kept channels, of each two rounds and warp
    ends: int  # of the lists, entries
    chunks: int  # keys and values
    sums: int  # of the lanes
    terms: int  # of the stream's channels, or of columns of gate and up
    warps: int  # one word a warp
    largest: int  # of each list and warp, the largest value
    norms: int  # of each list: what its sums are multiplied with
    later: int  # entries after which the lists of later planes begin, each for all of them
    counted: int  # words of the counts of one plane
    merged: int  # values of attention
    raw: int  # a key head's queries, key and value before the rotation
    ready: int  # and after it
    queries: int  # the queries in bfloat16
    heads: int  # sums of squares of 32 features
    fresh: int  # scores of the new token
    shares: int  # of a warp's chunk: the weights of its slots
    pieces: int  # of attention, one a warp
    weights: int  # of the pieces: highest scores and sums of weights
    stream: int  # the CTA's own channels of it
    scales: int  # of the columns
    biases: int  # of the columns of gate and up
    progress: int  # of each warp: the phases before, and the first flag
    tasks: int
    addresses: int  # of the arrays of every decoder block
    shared: int  # bytes in all
    own: int  # channels of the stream that a CTA adds up
    own_lanes: int  # lanes that do, whole warps
    squares: int  # sums of squares that are sent
    exchange: dict[str, int]  # where each part of the exchange begins
    mailboxes: int  # of the exchange in all


def chunk_copies(shape: FusedShape) -> int:
    """Vectors that a lane has of a chunk's keys and values."""
    return shape.head_dim // WARP * 2 + -(-shape.head_dim // 64) * QUAD


@functools.cache
def memory_layout(shape: FusedShape, config: FusedConfig) -> MemoryLayout:
    """Lay out shared memory and the exchange."""
    cuts = products(shape, config)
    warps = config.threads // WARP
    capacity = max(p.channels for p in cuts.values())
    rounds = -(-capacity // (CHANNELS_AT_ONCE * config.threads))
    own = -(-shape.hidden // (2 * config.ctas)) * 2
    own_lanes = -(-own // WARP) * WARP
    features = (shape.group + 2) * shape.head_dim
    attention = {
        "chunks": LOAD * 2 * chunk_copies(shape) * ATTENDING * WARP,
        "merged": 4 * cuts["attn_out"].channels,
        "raw": 4 * features,
        "ready": 4 * features,
        "queries": 2 * QUERIES * shape.head_dim,
        "heads": 4 * -(-features // WARP),
        "fresh": 4 * QUERIES,
        "shares": 4 * ATTENDING * QUERIES * PADDED,
        "pieces": 4 * ATTENDING * shape.group * shape.head_dim,
        "weights": 4 * ATTENDING * QUERIES * 2,
    }
    at, end = _one_after_the_other(attention, 0)
    # Gate and up have a list each.
    first = max(p.channels * sets(shape, p) * (2 if g == "mlp_in" else 1) for g, p in cuts.items())
    lists, counted = 4 * first * shape.planes, -(-rounds // 2) * warps
    integers = shape.format.scaled
    sizes = {
        "counts": 4 * counted * shape.planes,
        "ends": 4 * 2 if integers else 0,
        "sums": 4 * config.threads // QUAD * shape.each,
        "terms": 4 * config.threads,
        "warps": 4 * warps,
        "largest": 4 * lists_of(shape, config) * warps if integers else 0,
        "norms": 4 * lists_of(shape, config) if integers else 0,
        "stream": 4 * own_lanes,
        "scales": 4 * config.threads if shape.format.column_scales else 0,
        "biases": 4 * config.threads if shape.has_bias("gate", "up") else 0,
        "progress": 8 * warps,
        "tasks": 4 * len(PHASES) * len(Task._fields),
        "addresses": 8 * config.depth * len(block_arrays(shape)),
    }
    # Nothing of attention is needed once lists are written. What shared memory takes is lost to the cache, in which the
    # rows that are on their way have room.
    more, shared = _one_after_the_other(sizes, max(end, -(-lists // LOAD) * LOAD))
    at |= more | {"lists": 0}
    squares = -(-shape.hidden // own) * own_lanes // WARP
    parts = {
        "stream": shape.hidden // 2,
        "stream squares": squares,
        "qkv": cuts["attn_in"].splits * sum(shape.sizes_in),
        "attended": config.attention_splits * shape.attended,
        "weights": 2 * config.attention_splits * shape.heads,
        "out": cuts["attn_out"].splits * shape.hidden,
        "middle": shape.hidden // 2,
        "middle squares": squares,
        "gated": shape.intermediate // 2,
        "down": cuts["mlp_mid"].splits * shape.hidden,
    }
    exchange, mailboxes = _one_after_the_other(parts, 0)
    return MemoryLayout(
        **at, second=cuts["mlp_in"].channels, later=first, counted=counted, rounds=rounds, shared=shared, own=own,
        own_lanes=own_lanes,
        squares=squares, exchange=exchange, mailboxes=mailboxes,
    )  # fmt: skip


def _one_after_the_other(sizes: dict[str, int], start: int) -> tuple[dict[str, int], int]:
    """Where each thing begins, in multiples of 16, and the end of all."""
    at = {}
    for name, size in sizes.items():
        at[name] = start
        start += -(-size // LOAD) * LOAD
    return at, start
