"""The kernel, lane by lane: everything of the decoder between the attention of one block and that of the next.

All blocks of threads run at once and walk through the same phases, one product each:

    o                     of attention, whose splits are merged     -> partial sums posted, added to the stream
    gate and up           of the normed stream                      -> silu(gate) * up posted
    down                  of that                                   -> partial sums posted, added to the stream
    q, k and v            of the stream, normed for the next block  -> partial sums for its attention

A phase lists the channels that its layers keep, then multiplies one tile of columns with the channels of one split.
Fours of lanes stand side by side over the tile's vectors of 16 bytes, in as many rows as there are lanes for; what they
read goes from registers to the tensor cores. All phases run the same instructions in a loop: a launch runs each phase
once, and instructions that are not in the processor's cache have to be fetched like the weights.

Where a phase needs what all blocks made in the phase before, values travel through device memory as posts: eight bytes
that hold a word and a tag, written and read in one piece, so that who finds the tag has the value, and no barrier is
needed. The tags of a launch are its own.
"""

from __future__ import annotations

from typing import Any

from kernels_pallas.fused_block.inputs import Inputs
from kernels_pallas.fused_block.layout import PHASES, Task
from kernels_pallas.fused_block.lists import Lists
from kernels_pallas.fused_block.products import Products
from kernels_pallas.fused_block.results import Results


class Block(Inputs, Lists, Products, Results):
    """One launch, as a block of threads sees it."""

    def run(self) -> None:
        """All phases."""
        m, shape = self.m, self.shape
        phases = len(PHASES) if shape.sizes_next else len(PHASES) - 1
        m.open_stream()
        self.tag = m.load(self.at["tag"])
        x = m.load_bfloat16(self.at["x"] + self.owned * 2)
        words = phases * len(Task._fields)
        task = m.load(self.at["tasks"] + (self.block * words + m.least(self.thread, words - 1)) * 4)
        self.merge()
        m.write(self.place("tasks", self.thread), [task], self.thread < words)
        m.write(self.place("stream", self.thread), [m.as_bits(x)], self.thread < self.room.own_lanes)
        m.sync()
        m.loop(m.opaque(phases), [], lambda phase, _: self.phase(phase))

    def phase(self, phase: Any) -> list[Any]:
        """One product and what follows it."""
        m, task = self.m, self.begin_phase(phase)

        def work() -> None:
            counts = self.list_kept(task, self.fetch(task))
            total = self.product(task, counts)
            self.hand_on(task, total)

        m.when(task.working.equals(1), work)
        m.when(self.adding, self.add)
        return []
