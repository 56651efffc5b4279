"""What all parts of the kernel share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from kernels_pallas.fused_block.formats import FORMATS, Format
from kernels_pallas.fused_block.layout import (
    PHASES,
    SET,
    WARP,
    FusedConfig,
    FusedShape,
    Product,
    Task,
    entries,
    lists,
    products,
)
from kernels_pallas.fused_block.places import Places, places_of
from kernels_pallas.lanes.machine import Machine

POST = 8  # bytes


@dataclasses.dataclass
class LaneChannels:
    """Four channels of a lane, as integers and conditions of it, and what becomes of them."""

    place: Any  # in the split, or the last ones
    channel: Any
    active: Any  # whether any lane of the warp has channels
    real: Any  # whether this lane has
    limits: list[Any]  # of both lists, bits
    gains: list[Any]  # of the norm, in pairs
    scales: list[list[Any]]  # of each list, in pairs
    values: list[Any] = dataclasses.field(default_factory=list)  # in pairs
    entries: list[Any] = dataclasses.field(default_factory=list)
    mask: Any = None
    before: Any = None


class Base:
    """What a block of threads knows of its launch. `at` has the address of every array by name."""

    def __init__(
        self, m: Machine[Any], shape: FusedShape, config: FusedConfig, depth: int, at: dict[str, Any], shared: Any
    ):
        self.m, self.shape, self.config, self.depth, self.at = m, shape, config, depth, at
        self.cuts: dict[str, Product] = products(shape, config)
        self.places: Places = places_of(shape, config)
        self.entries = entries(shape)
        self.shared = shared
        self.format: Format = FORMATS[shape.kind]
        self.each = shape.each
        self.integers, self.grouped = self.format.surplus is not None, shape.kind == "int4"
        self.lists = lists(shape, config)
        self.threads, self.warps = config.threads, config.threads // WARP
        self.block, self._thread, self._warp = m.block(), m.thread(), m.warp()
        self.turn: Any = None  # of all decoder blocks' phases
        self.first_tag: Any = None  # of the first decoder block
        self.tag: Any = None  # of the decoder block that the phase is of
        self.decoder: Any = None  # which one that is
        self.opening: Any = None  # which phase it is
        self.merging: Any = None
        self.gating: Any = None
        self.adding: Any = None
        self.find_place()

    def find_place(self) -> None:
        """Who the lane is; anew, so that nothing that follows from it is kept in registers where it is not needed."""
        m = self.m
        self.thread, self.warp = m.again(self._thread), m.again(self._warp)
        self.lane = self.thread % WARP
        self.always = self.thread >= 0
        # The channel of the stream that the lane adds up, and whether it has one.
        own = self.block * self.places.own + self.thread
        hidden = self.shape.hidden
        self.owned, self.owns = m.least(own, hidden - 1), (self.thread < self.places.own) & (own < hidden)

    def place(self, name: str, index: Any = 0) -> Any:
        """The address of a word of a part of shared memory."""
        start = self.shared + getattr(self.places, name)
        return start + index * 4 if not isinstance(index, int) else start + 4 * index

    def list_start(self, of_second: Any) -> Any:
        """The entry with which a list begins, gate's or any other one, or up's."""
        return self.m.select(of_second, self.m.integer(self.places.second), self.m.integer(0))

    def set_of(self, vector: Any) -> Any:
        """Which set of the tile a vector is in."""
        return vector // SET

    def post_of(self, part: str, index: Any) -> Any:
        """The address of a post."""
        return self.at["exchange"] + (index + self.places.exchange[part]) * POST

    def go_to(self, turn: Any, first_tag: Any) -> None:
        """Note which of all decoder blocks' phases comes, and the first of them's tag; each warp for itself."""
        m = self.m
        m.sync_warp()  # what stands there has been read
        m.write(self.place("turns", self.warp * 2), [turn, first_tag], self.lane.equals(0))
        m.sync_warp()

    def begin_phase(self) -> Any:
        """Note which phase it is, and who the lane is; the phase's number.

        From shared memory, as what a register has to keep meanwhile is kept in device memory.
        """
        self.find_place()
        self.turn, self.first_tag = self.m.read_two(self.place("turns", self.warp * 2))
        phase, self.decoder = self.turn & (len(PHASES) - 1), self.turn >> (len(PHASES) // 2)
        self.tag = self.first_tag + self.decoder
        self.opening, self.merging, self.gating = phase.equals(0), phase.equals(1), phase.equals(2)
        self.adding = (phase & 1).equals(1)
        return phase

    def task(self, phase: Any) -> Any:
        """Read the block's task in a phase."""
        words = []
        for k in range(0, len(Task._fields), 4):
            words += self.m.read_four(self.place("tasks", phase * len(Task._fields) + k))
        return Task(*words)

    def address(self, name: str, further: Any = 0) -> Any:
        """Where the decoder block's array of this name is, or one that stands further behind it."""
        return self.m.read_address(self.where(name, further))

    def where(self, name: str, further: Any = 0) -> Any:
        """Where that address stands in shared memory."""
        row = self.shared + self.places.addresses + self.decoder * (8 * len(self.entries))
        if not isinstance(further, int):
            row, further = row + further * 8, 0
        return row + 8 * (further + self.entries[name])

    def bias_of_either(self, condition: Any, one: str, other: str) -> tuple[Any, Any]:
        """Where the bias of the one layer is, or of the other, and whether it is there; one of them has one."""
        if one not in self.shape.biases:
            return self.address(f"bias_{other}"), condition ^ True
        if other not in self.shape.biases:
            return self.address(f"bias_{one}"), condition
        return self.m.select(condition, self.address(f"bias_{one}"), self.address(f"bias_{other}")), self.always

    def column(self, task: Any) -> tuple[Any, Any]:
        """Whether the lane's column is of up's tile, behind gate's, and its place in the tile."""
        m = self.m
        second = self.thread >= task.columns
        return second, m.least(m.select(second, self.thread - task.columns, self.thread), task.columns - 1)

    def fragments(self, rows: list[Any], word: int) -> list[Any]:
        """One word of each of four rows of bfloat16, as the tensor cores take them."""
        return [self.m.permute(rows[k][word], rows[k + 1][word], s) for k in (0, 2) for s in (0x5410, 0x7632)]

    def sum_of_warp(self, number: Any) -> Any:
        """The sum of the floats of the lanes of the warp, in every lane."""
        for distance in (16, 8, 4, 2, 1):
            number = number + self.m.exchange(number, distance)
        return number

    def pair(self, number: Any) -> Any:
        """This lane's bfloat16 below the next lane's, in a word; for even lanes."""
        m = self.m
        return (m.as_bits(number) >> 16) | (m.as_bits(m.exchange(number, 1)) & -65536)

    @staticmethod
    def sum(terms: Sequence[Any]) -> Any:
        """Of values, two and two."""
        terms = list(terms)
        while len(terms) > 1:
            terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + terms[len(terms) // 2 * 2 :]
        return terms[0]
