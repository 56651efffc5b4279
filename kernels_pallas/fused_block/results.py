"""The last part of a phase: what becomes of the sums."""

from __future__ import annotations

from typing import Any

from kernels_pallas.fused_block.base import POST, Base
from kernels_pallas.fused_block.layout import WARP


class Results(Base):
    """Hands a product on to the next phase."""

    def hand_on(self, task: Any, total: Any) -> None:
        """Post partial sums, or silu(gate) * up."""
        m = self.m
        inside = self.thread < task.columns
        column = task.first_column + m.least(self.thread, task.columns - 1)
        m.when(self.gating, lambda: self.gate(task, total, column, inside))
        where = self.at["exchange"] + (task.out + column) * POST
        m.post(where, m.as_bits(total), self.tag, inside & (self.gating ^ True))

    def gate(self, task: Any, total: Any, column: Any, inside: Any) -> None:
        """Both products in bfloat16 with their biases, their sum's silu, and a post for every two columns."""
        m = self.m
        own = m.rounded(total)
        if self.shape.has_bias("gate", "up"):
            own = m.rounded(own + m.as_float(m.read(self.place("biases", self.thread))))
        m.write(self.place("terms", self.thread), [m.as_bits(own)])
        m.sync()
        mine = m.least(self.thread, task.columns - 1)
        gate, up = (m.as_float(m.read(self.place("terms", mine + task.columns * k))) for k in range(2))
        hidden = m.rounded(gate / (m.exp(gate * -1.0) + 1.0) * up)
        word = self.pair(hidden)
        m.post(self.post_of("gated", column // 2), word, self.tag, inside & (self.thread % 2).equals(0))

    def add(self) -> None:
        """Add a product's partial sums to the stream, each block for channels of its own, and post it."""
        m, places, lanes, hidden = self.m, self.places, self.places.own_lanes, self.shape.hidden
        splits = m.select(self.merging, *(m.integer(n) for n in self.added_splits()))
        part = m.select(self.merging, m.integer(places.exchange["out"]), m.integer(places.exchange["down"]))
        split, place = self.thread // lanes, self.thread % lanes
        channel = m.least(self.block * places.own + place, hidden - 1)
        bias = None
        if self.shape.has_bias("o", "down"):  # on its way while the block waits for the sums
            at, has = self.bias_of_either(self.merging, "o", "down")
            bias = m.select(has, m.load_bfloat16(at + self.owned * 2), m.number(0.0))

        def fetch() -> None:
            where = self.at["exchange"] + (part + split * hidden + channel) * POST
            m.write(self.place("terms", self.thread), m.poll([], [(where, self.always)], self.tag))

        m.when(split < splits, fetch)
        m.sync()
        m.when(self.thread < lanes, lambda: self.add_own(splits, bias))

    def added_splits(self) -> tuple[int, int]:
        """Of o and of down."""
        return self.cuts["attn_out"].splits, self.cuts["mlp_mid"].splits

    def add_own(self, splits: Any, bias: Any) -> None:
        """The first warps add up the terms, and the product's bias if it has one."""
        m, places, lanes = self.m, self.places, self.places.own_lanes
        most = max(self.added_splits())
        terms = [
            m.as_float(m.read_or_zero(self.place("terms", self.thread + lanes * s), m.integer(s) < splits))
            for s in range(most)
        ]
        total = m.rounded(self.sum(terms))
        if bias is not None:
            total = m.rounded(total + bias)
        stream = m.rounded(m.as_float(m.read(self.place("stream", self.thread))) + total)
        m.write(self.place("stream", self.thread), [m.as_bits(stream)])
        m.store_bfloat16(self.at["new_x"] + self.owned * 2, stream, self.owns)
        middle, last = (
            [m.integer(places.exchange[f"{name}{part}"]) for part in ("", " squares")] for name in ("middle", "stream")
        )
        self.publish(stream, [m.select(self.merging, a, b) for a, b in zip(middle, last, strict=True)], self.tag)

    def publish(self, stream: Any, where: list[Any], tag: Any) -> None:
        """Post the block's own channels of the stream, and the sum of their squares."""
        m, at = self.m, self.at["exchange"]
        word = self.pair(stream)
        m.post(at + (where[0] + self.owned // 2) * POST, word, tag, self.owns & (self.thread % 2).equals(0))
        square = self.sum_of_warp(m.select(self.owns, stream * stream, m.number(0.0)))
        index = self.block * (self.places.own_lanes // WARP) + self.warp
        has = self.lane.equals(0) & (index < self.places.squares)
        m.post(at + (where[1] + index) * POST, m.as_bits(square), tag, has)
