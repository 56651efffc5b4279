"""The last part of a phase: what becomes of the sums."""

from __future__ import annotations

from typing import Any

from kernels_pallas.fused_block.base import MAILBOX, Base
from kernels_pallas.fused_block.tiling import WARP


class Results(Base):
    """Hands a product on to the next phase."""

    def hand_on(self, task: Any, total: Any) -> None:
        """Send partial sums, or silu(gate) * up."""
        m = self.m
        inside = self.thread < task.columns
        column = task.first_column + m.minimum(self.thread, task.columns - 1)
        m.when(self.gating, lambda: self.gate(task, total, column, inside))
        where = self.at["exchange"] + (task.out + column) * MAILBOX
        m.send(where, m.as_bits(total), self.flag, inside & (self.gating ^ True))

    def gate(self, task: Any, total: Any, column: Any, inside: Any) -> None:
        """Both products in bfloat16 with their biases, their sum's silu, sent in a mailbox for every two columns."""
        m = self.m
        own = m.round_bfloat16(total)
        if self.shape.has_bias("gate", "up"):
            own = m.round_bfloat16(own + m.as_float(m.read(self.smem("biases", self.thread))))
        m.write(self.smem("terms", self.thread), [m.as_bits(own)])
        m.sync()
        mine = m.minimum(self.thread, task.columns - 1)
        gate, up = (m.as_float(m.read(self.smem("terms", mine + task.columns * k))) for k in range(2))
        hidden = m.round_bfloat16(gate / (m.exp(gate * -1.0) + 1.0) * up)
        word = self.pair(hidden)
        m.send(self.mailbox("gated", column // 2), word, self.flag, inside & (self.thread % 2).equals(0))

    def add(self) -> None:
        """Add a product's partial sums to the stream, each CTA for channels of its own, and send it."""
        m, layout, lanes, hidden = self.m, self.layout, self.layout.own_lanes, self.shape.hidden
        splits = m.select(self.merging, *(m.integer(n) for n in self.added_splits()))
        part = m.select(self.merging, m.integer(layout.exchange["out"]), m.integer(layout.exchange["down"]))
        split, own = self.thread // lanes, self.thread % lanes
        channel = m.minimum(self.cta * layout.own + own, hidden - 1)
        bias = None
        if self.shape.has_bias("o", "down"):  # on its way while the CTA waits for the sums
            at, has = self.bias_of_either(self.merging, "o", "down")
            bias = m.select(has, m.load_bfloat16(at + self.owned * 2), m.float32(0.0))

        def fetch() -> None:
            where = self.at["exchange"] + (part + split * hidden + channel) * MAILBOX
            m.write(self.smem("terms", self.thread), m.poll([], [(where, self.always)], self.flag))

        m.when(split < splits, fetch)
        m.sync()
        m.when(self.thread < lanes, lambda: self.add_own(splits, bias))

    def added_splits(self) -> tuple[int, int]:
        """Of o and of down."""
        return self.cuts["attn_out"].splits, self.cuts["mlp_mid"].splits

    def add_own(self, splits: Any, bias: Any) -> None:
        """The first warps add up the terms, and the product's bias if it has one."""
        m, layout, lanes = self.m, self.layout, self.layout.own_lanes
        most = max(self.added_splits())
        terms = [
            m.as_float(m.read_or_zero(self.smem("terms", self.thread + lanes * s), m.integer(s) < splits))
            for s in range(most)
        ]
        total = m.round_bfloat16(self.sum(terms))
        if bias is not None:
            total = m.round_bfloat16(total + bias)
        stream = m.round_bfloat16(m.as_float(m.read(self.smem("stream", self.thread))) + total)
        m.write(self.smem("stream", self.thread), [m.as_bits(stream)])
        m.store_bfloat16(self.at["new_x"] + self.owned * 2, stream, self.owns)
        middle, last = (
            [m.integer(layout.exchange[f"{name}{part}"]) for part in ("", " squares")] for name in ("middle", "stream")
        )
        self.publish(stream, [m.select(self.merging, a, b) for a, b in zip(middle, last, strict=True)], self.flag)

    def publish(self, stream: Any, where: list[Any], flag: Any) -> None:
        """Send the CTA's own channels of the stream, and the sum of their squares."""
        m, at = self.m, self.at["exchange"]
        word = self.pair(stream)
        m.send(at + (where[0] + self.owned // 2) * MAILBOX, word, flag, self.owns & (self.thread % 2).equals(0))
        square = self.warp_sum(m.select(self.owns, stream * stream, m.float32(0.0)))
        index = self.cta * (self.layout.own_lanes // WARP) + self.warp
        has = self.lane.equals(0) & (index < self.layout.squares)
        m.send(at + (where[1] + index) * MAILBOX, m.as_bits(square), flag, has)
