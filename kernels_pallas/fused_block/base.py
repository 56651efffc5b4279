"""What all parts of the kernel share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from kernels_pallas.fused_block.layout import LOAD, WARP, FusedConfig, FusedShape, Product, Room, Task, products, room

POST = 8  # bytes


@dataclasses.dataclass
class Turn:
    """Four channels of a lane, as integers and conditions of it, and what becomes of them."""

    place: Any  # in the split, or the last ones
    channel: Any
    active: Any  # whether any lane of the warp has channels
    real: Any  # whether this lane has
    limits: list[Any]  # of both lists, bits
    gains: list[Any]  # of the norm, in pairs
    values: list[Any] = dataclasses.field(default_factory=list)  # in pairs
    entries: list[Any] = dataclasses.field(default_factory=list)
    mask: Any = None
    before: Any = None


class Base:
    """What a block of threads knows of its launch. `at` has the address of every array by name."""

    def __init__(self, m: Any, shape: FusedShape, config: FusedConfig, at: dict[str, Any], shared: Any):
        self.m, self.shape, self.config, self.at = m, shape, config, at
        self.cuts: dict[str, Product] = products(shape, config)
        self.room: Room = room(shape, config)
        self.shared = shared
        self.each = LOAD // shape.item
        self.threads, self.warps = config.threads, config.threads // WARP
        self.thread, self.block, self.warp = m.thread(), m.block(), m.warp()
        self.lane = self.thread % WARP
        self.always = self.thread >= 0
        # The channel of the stream that the lane adds up, and whether it has one.
        own = self.block * self.room.own + self.thread
        self.owned, self.owns = m.least(own, shape.hidden - 1), (self.thread < self.room.own) & (own < shape.hidden)
        self.tag: Any = None  # of the launch, read first
        self.merging: Any = None  # which phase it is
        self.gating: Any = None
        self.last: Any = None
        self.adding: Any = None

    def place(self, name: str, index: Any = 0) -> Any:
        """The address of a word of a part of shared memory."""
        start = self.shared + getattr(self.room, name)
        return start + index * 4 if not isinstance(index, int) else start + 4 * index

    def post_of(self, part: str, index: Any) -> Any:
        """The address of a post."""
        return self.at["exchange"] + (index + self.room.exchange[part]) * POST

    def begin_phase(self, phase: Any) -> Any:
        """Note which phase it is, and read the block's task in it."""
        m, words = self.m, []
        for k in range(0, len(Task._fields), 4):
            words += m.read_four(self.place("tasks", phase * len(Task._fields) + k))
        self.merging, self.gating = phase.equals(0), phase.equals(1)
        self.last = phase.equals(3)
        self.adding = self.merging | phase.equals(2)
        return Task(*words)

    def by_phase(self, o: Any, gate: Any, down: Any, inputs: Sequence[Any], task: Any) -> Any:
        """What belongs to the phase, and of q, k and v to the layer."""
        m = self.m
        chosen = m.select(self.merging, o, m.select(self.gating, gate, down))
        if not self.shape.sizes_next:
            return chosen
        layer = m.select(task.layer.equals(0), inputs[0], m.select(task.layer.equals(1), inputs[1], inputs[2]))
        return m.select(self.last, layer, chosen)

    def sum_of_warp(self, number: Any) -> Any:
        """The sum of the floats of the lanes of the warp, in every lane."""
        for distance in (16, 8, 4, 2, 1):
            number = number + self.m.exchange(number, distance)
        return number

    @staticmethod
    def sum(terms: Sequence[Any]) -> Any:
        """Of values, two and two."""
        terms = list(terms)
        while len(terms) > 1:
            terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + terms[len(terms) // 2 * 2 :]
        return terms[0]
