"""What all parts of the kernel share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from kernels_pallas.formats import Format
from kernels_pallas.fused_block.memory_layout import MemoryLayout, memory_layout
from kernels_pallas.fused_block.tiling import (
    LOAD,
    PHASES,
    SET,
    WARP,
    FusedConfig,
    FusedShape,
    Product,
    Task,
    block_arrays,
    lists,
    products,
)
from kernels_pallas.lanes.machine import Machine

MAILBOX = 8  # bytes: a word and a flag


@dataclasses.dataclass
class LaneChannels:
    """Four channels of a lane, as integers and conditions of it, and what becomes of them."""

    offset: Any  # of the first of them in the split
    channel: Any
    active: Any  # whether any lane of the warp has channels
    valid: Any  # whether this lane has
    thresholds: list[Any]  # of both lists, bits
    gains: list[Any]  # of the norm, in pairs
    scales: list[list[Any]]  # of each list, in pairs
    values: list[Any] = dataclasses.field(default_factory=list)  # in pairs
    entries: list[Any] = dataclasses.field(default_factory=list)
    later_thresholds: list[list[Any]] = dataclasses.field(default_factory=list)  # as thresholds, of each later plane
    masks: list[Any] = dataclasses.field(default_factory=list)  # of each plane, which of the channels of both lists
    before: list[Any] = dataclasses.field(default_factory=list)  # of each plane


class Base:
    """What a CTA knows of its launch. `at` has the address of every array by name."""

    def __init__(
        self, m: Machine[Any], shape: FusedShape, config: FusedConfig, depth: int, at: dict[str, Any], shared: Any
    ):
        self.m, self.shape, self.config, self.depth, self.at = m, shape, config, depth, at
        self.cuts: dict[str, Product] = products(shape, config)
        self.layout: MemoryLayout = memory_layout(shape, config)
        self.block_arrays = block_arrays(shape)
        self.shared = shared
        self.format: Format = shape.format
        assert self.format.multiplied is not None
        self.multiplied: str = self.format.multiplied
        self.planes = shape.planes
        # What rows are, of the first plane and of all later ones, and how many words of them a lane reads at once.
        self.rows, self.later_rows = self.format.row_forms[0], self.format.row_forms[-1]
        self.later_words = LOAD // 4 * self.later_rows.bits // self.rows.bits
        self.each = shape.each
        self.integers, self.grouped = self.format.scaled, self.format.group is not None
        self.lists = lists(shape, config)
        self.threads, self.warps = config.threads, config.threads // WARP
        self.cta, self._thread, self._warp = m.cta(), m.thread(), m.warp()
        self.step: Any = None  # phases before this one, of all decoder blocks
        self.first_flag: Any = None  # that of the first decoder block
        self.flag: Any = None  # of the decoder block that the phase is of
        self.decoder: Any = None  # which one that is
        self.opening: Any = None  # which phase it is
        self.merging: Any = None
        self.gating: Any = None
        self.factor: Any = None  # of all thresholds, where there is one
        self.adding: Any = None
        self.find_lane()

    def find_lane(self) -> None:
        """Who the lane is; anew, so that nothing that follows from it is kept in registers where it is not needed."""
        m = self.m
        self.thread, self.warp = m.opaque(self._thread), m.opaque(self._warp)
        self.lane = self.thread % WARP
        self.always = self.thread >= 0
        # The channel of the stream that the lane adds up, and whether it has one.
        own = self.cta * self.layout.own + self.thread
        hidden = self.shape.hidden
        self.owned, self.owns = m.minimum(own, hidden - 1), (self.thread < self.layout.own) & (own < hidden)

    def smem(self, name: str, index: Any = 0) -> Any:
        """The address of a word in a part of shared memory."""
        start = self.shared + getattr(self.layout, name)
        return start + index * 4 if not isinstance(index, int) else start + 4 * index

    def list_start(self, of_second: Any) -> Any:
        """The entry with which a list begins, gate's or any other one, or up's."""
        return self.m.select(of_second, self.m.integer(self.layout.second), self.m.integer(0))

    def later_start(self, start: Any) -> Any:
        """The entry with which a list of later planes begins, by that of the first plane's."""
        return start * (self.planes - 1) + self.layout.later

    def set_of(self, vector: Any) -> Any:
        """Which set of the tile a vector is in."""
        return vector // SET

    def mailbox(self, part: str, index: Any) -> Any:
        """The address of a mailbox."""
        return self.at["exchange"] + (index + self.layout.exchange[part]) * MAILBOX

    def go_to(self, step: Any, first_flag: Any) -> None:
        """Note how many phases are done, and the first decoder block's flag; each warp for itself."""
        m = self.m
        m.sync_warp()  # the warp has read what stands there
        m.write(self.smem("progress", self.warp * 2), [step, first_flag], self.lane.equals(0))
        m.sync_warp()

    def begin_phase(self) -> Any:
        """Note which phase it is, and who the lane is; the phase's number.

        From shared memory, as what a register has to keep meanwhile is kept in device memory.
        """
        self.find_lane()
        self.step, self.first_flag = self.m.read_two(self.smem("progress", self.warp * 2))
        phase, self.decoder = self.step & (len(PHASES) - 1), self.step >> (len(PHASES) // 2)
        self.flag = self.first_flag + self.decoder
        self.opening, self.merging, self.gating = phase.equals(0), phase.equals(1), phase.equals(2)
        self.adding = (phase & 1).equals(1)
        return phase

    def task(self, phase: Any) -> Any:
        """Read the CTA's task in a phase."""
        words = []
        for k in range(0, len(Task._fields), 4):
            words += self.m.read_four(self.smem("tasks", phase * len(Task._fields) + k))
        return Task(*words)

    def address(self, name: str, further: Any = 0) -> Any:
        """Where the decoder block's array of this name is, or one that stands further behind it."""
        return self.m.read_address(self.where(name, further))

    def where(self, name: str, further: Any = 0) -> Any:
        """Where that address stands in shared memory."""
        row = self.shared + self.layout.addresses + self.decoder * (8 * len(self.block_arrays))
        if not isinstance(further, int):
            row, further = row + further * 8, 0
        return row + 8 * (further + self.block_arrays[name])

    def bias_of_either(self, condition: Any, one: str, other: str) -> tuple[Any, Any]:
        """Where the bias of the one layer is, or of the other, and whether it is there; one of them has one."""
        if one not in self.shape.biases:
            return self.address(f"bias_{other}"), condition ^ True
        if other not in self.shape.biases:
            return self.address(f"bias_{one}"), condition
        return self.m.select(condition, self.address(f"bias_{one}"), self.address(f"bias_{other}")), self.always

    def column(self, task: Any) -> tuple[Any, Any]:
        """Whether the lane's column is of up's tile, behind gate's, and its offset in the tile."""
        m = self.m
        second = self.thread >= task.columns
        return second, m.minimum(m.select(second, self.thread - task.columns, self.thread), task.columns - 1)

    def fragments(self, rows: list[Any], word: int) -> list[Any]:
        """One word of each of four rows of bfloat16, as the tensor cores take them."""
        return [self.m.permute_bytes(rows[k][word], rows[k + 1][word], s) for k in (0, 2) for s in (0x5410, 0x7632)]

    def warp_sum(self, number: Any) -> Any:
        """The sum of the floats of the lanes of the warp, in every lane."""
        for distance in (16, 8, 4, 2, 1):
            number = number + self.m.shuffle_xor(number, distance)
        return number

    def pair(self, number: Any) -> Any:
        """This lane's bfloat16 below the next lane's, in a word; for even lanes."""
        m = self.m
        return (m.as_bits(number) >> 16) | (m.as_bits(m.shuffle_xor(number, 1)) & -65536)

    @staticmethod
    def sum(terms: Sequence[Any]) -> Any:
        """Of values, two and two."""
        terms = list(terms)
        while len(terms) > 1:
            terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + terms[len(terms) // 2 * 2 :]
        return terms[0]
