"""The kernel, lane by lane: some decoder blocks, one after the other.

A persistent kernel: all CTAs (thread blocks) run at once and walk through the same phases, one product each:

    q, k and v            of the stream, normed                     -> partial sums, to attention
    o                     of attention, which runs before it        -> partial sums, added to the stream
    gate and up           of the normed stream                      -> silu(gate) * up
    down                  of that                                   -> partial sums, added to the stream

In a phase a CTA lists the channels that its layers keep, then multiplies one tile of columns with the channels of one
split. Quads of lanes stand side by side over the tile's vectors of 16 bytes, in as many rows as there are lanes for;
what they read goes from registers to the tensor cores. All phases run the same instructions in a loop: instructions
that are not in the multiprocessor's cache have to be fetched like the weights.

CTAs hand values to each other through mailboxes in device memory, the array `exchange`. A mailbox is eight bytes: a
word and a flag, which one store writes and one load reads. Whoever finds the flag has the word, so no grid-wide barrier
is needed, as in NCCL's LL protocol. Each decoder block has a flag of its own, and uses the mailboxes of the one before
again: whoever writes one has read something that was made of values of every CTA that had read it.
"""

from __future__ import annotations

from typing import Any

from kernels_pallas.fused_block.inputs import Inputs
from kernels_pallas.fused_block.lists import Lists
from kernels_pallas.fused_block.products import Products
from kernels_pallas.fused_block.results import Results
from kernels_pallas.fused_block.tiling import PHASES, Task


class Kernel(Inputs, Lists, Products, Results):
    """One launch, as a CTA sees it."""

    def run(self) -> None:
        """All phases of all decoder blocks."""
        m, exchange = self.m, self.layout.exchange
        m.open_stream()
        flag = m.load(self.at["start_flag"])
        x = m.load_bfloat16(self.at["x"] + self.owned * 2)
        words = len(PHASES) * len(Task._fields)
        task = m.load(self.at["tasks"] + (self.cta * words + m.minimum(self.thread, words - 1)) * 4)
        self.note_addresses()
        m.write(self.smem("tasks", self.thread), [task], self.thread < words)

        def begin_stream() -> None:
            m.write(self.smem("stream", self.thread), [m.as_bits(x)])
            where = [m.integer(exchange[name]) for name in ("stream", "stream squares")]
            self.publish(x, where, flag - 1)

        m.when(self.thread < self.layout.own_lanes, begin_stream)
        self.go_to(m.integer(0), flag)
        m.sync()
        m.do_while(self.phase)

    def note_addresses(self) -> None:
        """Leave the addresses of all decoder blocks' arrays in shared memory, each warp some of them."""
        m = self.m
        names = [(b, name) for b in range(self.depth) for name in self.block_arrays]

        def leave_some(warp: int) -> None:
            for b, name in names[warp :: self.warps]:
                where = self.shared + self.layout.addresses + 8 * (b * len(self.block_arrays) + self.block_arrays[name])
                m.write_address(where, self.at[f"{name}_{b}"], self.lane.equals(0))

        for warp in range(self.warps):
            mine = self.warp.equals(warp)
            m.when(mine, lambda warp=warp: leave_some(warp))

    def phase(self) -> Any:
        """One product, with what comes before and after it; whether another phase follows."""
        m = self.m
        self.begin_phase()
        attends = self.cta < self.shape.kv_heads * self.config.attention_splits
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
        self.go_to(self.step + 1, self.first_flag)
        return self.step < len(PHASES) * self.depth - 1
