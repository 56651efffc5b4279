"""The kernel, lane by lane: some decoder blocks, one after the other.

All blocks of threads run at once and walk through the same phases, one product each:

    q, k and v            of the stream, normed                     -> partial sums posted
    o                     of attention, which runs before it        -> partial sums posted, added to the stream
    gate and up           of the normed stream                      -> silu(gate) * up posted
    down                  of that                                   -> partial sums posted, added to the stream

A phase lists the channels that its layers keep, then multiplies one tile of columns with the channels of one split.
Fours of lanes stand side by side over the tile's vectors of 16 bytes, in as many rows as there are lanes for; what they
read goes from registers to the tensor cores. All phases run the same instructions in a loop: instructions that are not
in the processor's cache have to be fetched like the weights.

Where a phase needs what all blocks made in the phase before, values travel through device memory as posts: eight bytes
that hold a word and a tag, written and read in one piece, so that who finds the tag has the value, and no barrier is
needed. Each decoder block has a tag of its own. Its posts lie where those of the decoder block before lay: whoever
writes one has read something that was made of values of every block of threads that had read the post before.
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
        """All phases of all decoder blocks."""
        m, exchange = self.m, self.places.exchange
        m.open_stream()
        tag = m.load(self.at["tag"])
        x = m.load_bfloat16(self.at["x"] + self.owned * 2)
        words = len(PHASES) * len(Task._fields)
        task = m.load(self.at["tasks"] + (self.block * words + m.least(self.thread, words - 1)) * 4)
        self.note_addresses()
        m.write(self.place("tasks", self.thread), [task], self.thread < words)

        def begin_stream() -> None:
            m.write(self.place("stream", self.thread), [m.as_bits(x)])
            where = [m.integer(exchange[name]) for name in ("stream", "stream squares")]
            self.publish(x, where, tag - 1)

        m.when(self.thread < self.places.own_lanes, begin_stream)
        self.go_to(m.integer(0), tag)
        m.sync()
        m.repeat(self.phase)

    def note_addresses(self) -> None:
        """Leave the addresses of all decoder blocks' arrays in shared memory, each warp some of them."""
        m = self.m
        names = [(b, name) for b in range(self.depth) for name in self.entries]

        def leave_some(warp: int) -> None:
            for b, name in names[warp :: self.warps]:
                where = self.shared + self.places.addresses + 8 * (b * len(self.entries) + self.entries[name])
                m.write_address(where, self.at[f"{name}_{b}"], self.lane.equals(0))

        for warp in range(self.warps):
            mine = self.warp.equals(warp)
            m.when(mine, lambda warp=warp: leave_some(warp))

    def phase(self) -> Any:
        """One product, with what comes before and after it; whether another one follows."""
        m = self.m
        self.begin_phase()
        attends = self.block < self.shape.kv_heads * self.config.attention_splits
        m.when(self.merging & attends, self.attend)
        task = self.task(self.begin_phase())

        def work() -> None:
            self.multiply(task, self.list_kept(task, *self.fetch(task)))
            m.sync()
            again = self.task(self.begin_phase())
            self.hand_on(again, self.total(again))

        m.when(task.working.equals(1), work)
        self.begin_phase()
        m.when(self.adding, self.add)
        self.begin_phase()
        self.go_to(self.turn + 1, self.first_tag)
        return self.turn < len(PHASES) * self.depth - 1
