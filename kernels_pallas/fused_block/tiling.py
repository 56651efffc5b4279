"""How the CTAs share the work: sizes, and the products cut into tiles and splits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

from kernels_pallas.formats import FORMATS, Format

LOAD = 16  # bytes that a lane reads of a row at once: a vector of weights
LINE = 128  # bytes of the cache's lines
WARP = 32
QUAD = 4  # lanes that share a vector of columns, as in the tensor cores' fragments
SET = 4  # vectors beside each other whose quads have the same rows
MOST_SETS = 2  # of a tile, where each has scales of its own
CHUNK = 16  # slots of attention that a warp takes at once
ATTENDING = 4  # warps of a CTA that do, at most
UNEVEN = 1.4  # vectors of the widest tile to those of an even share, at most, for edges at lines
QUERIES = 8  # of a key head, at most
PADDED = CHUNK + 4  # words of a query's weights in a chunk, in banks of their own
CHANNELS_AT_ONCE = 4  # channels that a lane takes at once
ENTRIES = 16  # of a list that a quad takes at once
BATCHES = 2  # of these that are on their way, or being multiplied
SHARED_MEMORY = 227 * 1024  # bytes that one CTA may have on Hopper
LARGEST_WEIGHT = 2**31  # bytes: offsets of rows are 32 bits wide
MOST_CHANNELS = 2**15  # an entry of a list has 16 bits for the channel, and a count less than that


@dataclasses.dataclass(frozen=True)
class FusedConfig:
    """What a tuner may choose; the sizes of a model decide the rest."""

    ctas: int  # thread blocks, at most one a multiprocessor: they wait for each other, so all must run at once
    threads: int = 512
    splits_in: int = 5  # into how many partial sums q, k and v are split
    splits_out: int = 8  # likewise the output projection
    splits_down: int = 8
    unit: int = LINE // LOAD  # vectors that a tile's edges are multiples of, at most: see `cut`
    attention_splits: int = 16  # parts of the slots
    depth: int = 16  # decoder blocks of a launch


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of the kernel: CTAs by tiles of columns and splits of the input channels."""

    size_in: int
    sizes_out: tuple[int, ...]  # of layers beside each other: q, k and v
    splits: int
    tiles: tuple[int, ...]  # of each layer
    each: int  # columns of a vector
    unit: int  # vectors that a tile's edge is a multiple of, but a layer's last one

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
    """Everything about a decoder block that the kernel is compiled for."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    kind: str  # the format of weights, by name
    eps: float
    biases: tuple[str, ...]  # layers that have one
    qk_norm: bool

    def has_bias(self, *layers: str) -> bool:
        """Whether any of the layers has one."""
        return any(layer in self.biases for layer in layers)

    @property
    def format(self) -> Format:
        """The format of the weights."""
        return FORMATS[self.kind]

    @property
    def planes(self) -> int:
        """Of a weight; each has rows, thresholds and counts of its own."""
        return len(self.format.planes)

    @property
    def bits(self) -> int:
        """Of a weight in a row, of planes in those of the first."""
        return self.format.planes[0]

    @property
    def each(self) -> int:
        """Columns that one vector load of a lane brings."""
        return LOAD * 8 // self.bits

    @property
    def attended(self) -> int:
        """Features of all query heads together."""
        return self.heads * self.head_dim

    @property
    def sizes_in(self) -> tuple[int, int, int]:
        """Columns of q, k and v."""
        return self.attended, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim

    @property
    def group(self) -> int:
        """Queries of a key head."""
        return self.heads // self.kv_heads


def cut(
    size_in: int, sizes_out: tuple[int, ...], splits: int, ctas: int, kind: str, unit: int = LINE // LOAD
) -> Product:
    """Share the columns of the layers among the CTAs of one split, the widest tiles as narrow as they can be.

    Tiles begin where lines of the cache do, if that leaves none much wider than others: what lies across lines is asked
    for twice, and the multiprocessors' way to the memory takes only so many requests. Wider ones than the even share
    are no loss up to a point, as fewer multiprocessors than there are can keep the memory busy. Where columns of a row
    share a scale, tiles begin where those of a scale do.
    """
    each, least = LOAD * 8 // FORMATS[kind].planes[0], 1 if FORMATS[kind].group is None else SET
    channels = -(-size_in // (splits * WARP)) * WARP
    splits = -(-size_in // channels)  # splits of whole warps may be fewer
    unit, vectors = max(unit, least), [n // each for n in sizes_out]
    share = sum(vectors) / (ctas // splits)
    while True:
        found = Product(size_in, sizes_out, splits, _tiles(vectors, ctas // splits, unit), each, unit)
        fits = all(v % unit == 0 for v in vectors) and found.widest <= UNEVEN * share
        if fits or unit == least:
            return found
        unit //= 2


def _tiles(vectors: Sequence[int], ctas: int, unit: int) -> tuple[int, ...]:
    """How many tiles each layer gets."""
    counts = [1] * len(vectors)
    units = [-(-v // unit) for v in vectors]
    for _ in range(ctas - len(vectors)):
        widest = max(range(len(units)), key=lambda i: -(-units[i] // counts[i]))
        if units[widest] <= counts[widest]:
            break
        counts[widest] += 1
    return tuple(counts)


PHASES = ("attn_in", "attn_out", "mlp_in", "mlp_mid")  # input groups in the order of their products
COUNTED = {"attn_in": 0, "attn_out": 3, "mlp_in": 4, "mlp_mid": 6}  # rows of the counts: q, k, v, o, gate, up, down
COUNTS = 7
FIRST_LAYER = {"attn_in": "q", "attn_out": "o", "mlp_in": "gate", "mlp_mid": "down"}
ENTERED = ("q", "k", "v", "o", "gate", "down", "up")  # layers in the order of the addresses


@functools.cache
def products(shape: FusedShape, config: FusedConfig) -> dict[str, Product]:
    """The products of a decoder block by input group; gate and up are one, with the same columns of both in a tile."""
    make = functools.partial(cut, ctas=config.ctas, kind=shape.kind, unit=config.unit)
    return {
        "attn_in": make(shape.hidden, shape.sizes_in, config.splits_in),
        "attn_out": make(shape.attended, (shape.hidden,), config.splits_out),
        "mlp_in": make(shape.hidden, (shape.intermediate,), 1),
        "mlp_mid": make(shape.intermediate, (shape.hidden,), config.splits_down),
    }


@functools.cache
def block_arrays(shape: FusedShape) -> dict[str, int]:
    """The arrays that every decoder block has of its own, and their index in its row of addresses."""
    names = [f"kernel_{n}" for n in ENTERED]
    names += [f"plane{k}_{n}" for k in range(1, shape.planes) for n in ENTERED]
    names += [f"thresholds_{group}" for group in PHASES]
    names += [f"scale_{n}" for n in ENTERED] if shape.format.scaled else []
    names += ["attn_norm", "mlp_norm", "keys", "values"]
    names += ["q_norm", "k_norm"] if shape.qk_norm else []
    names += [f"bias_{n}" for n in ENTERED if n in shape.biases]
    return {name: i for i, name in enumerate(names)}


class Task(NamedTuple):
    """What one CTA does in one phase, as the kernel reads it: integers, four at a time."""

    working: int  # 1, or 0 if the CTA has no part of the product
    first_channel: int
    channels: int
    lists: int  # 2 for gate and up
    width: int  # vectors of the tile, in whole sets
    rows: int  # of quads that stand over the tile
    columns: int  # of the tile
    first_column: int
    start: int  # bytes before it in a row of the weight
    stride: int  # bytes of such a row
    entry: int  # the layer, as in ENTERED
    note: int  # where the length of the list is noted
    notes: int  # 1 if this CTA notes it
    out: int  # the mailbox of the first column's partial sum
    source: int  # the mailbox of the input's first channels
    squares: int  # the mailbox of the first sum of the stream's squares
    normed: int  # 1 if the input is the normed stream
    thresholds: int  # bytes before the layer's thresholds
    second_thresholds: int  # bytes from these to up's
    behind: int  # 1 if the input was sent under the flag of the decoder block before
    phase: int
    step: int  # entries of a list that the CTA takes at once
    narrow: int  # 2^16 / width, rounded up
    share: int  # 2^32 / step, rounded up
    other: int  # entries after which the lists of the second set begin
    scales: int  # bytes before the scales of the first set
    next_scales: int  # bytes from these to the second set's, 0 if there is none
    row_columns: int  # columns of a row of quads, of vectors in whole sets
    next_plane: int  # bytes from the thresholds of one plane to those of the next
    later_start: int  # as start, of a row of a later plane
    later_stride: int
    plane_note: int  # from where one plane's length is noted to where the next one's is


def sets(shape: FusedShape, product: Product) -> int:
    """Sets of a tile that have lists of their own, as they have scales of their own."""
    return 1 if shape.format.group is None else -(-product.widest // SET)


def lists(shape: FusedShape, config: FusedConfig) -> int:
    """Most lists of a phase: of the layers, for each set."""
    return max(2, *(sets(shape, p) * (2 if g == "mlp_in" else 1) for g, p in products(shape, config).items()))


def most_splits(shape: FusedShape, config: FusedConfig) -> int:
    """The largest number of splits of any product."""
    return max(p.splits for p in products(shape, config).values())
