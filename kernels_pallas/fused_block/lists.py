"""The second part of a phase: which channels each layer keeps."""

from __future__ import annotations

from typing import Any

from kernels_pallas.fused_block.base import Base, Turn
from kernels_pallas.fused_block.layout import TURN, WARP, most_splits


class Lists(Base):
    """Writes the lists of kept channels."""

    def list_kept(self, task: Any, turns: list[Turn]) -> list[Any]:
        """Write a list for each layer: a word for each kept channel, its number below and its value above.

        The channels of a turn come before those of the next, a warp's before the next warp's, and a lane's before the
        next lane's. Two counts share a word, gate's and up's.
        """
        m, zero = self.m, self.m.integer(0)
        (scale,) = m.choose(turns[0].active, "f", lambda: self.norm_scale(), lambda: [m.number(0.0)])
        largest = zero
        for number, turn in enumerate(turns):
            *entries, turn.mask, turn.before, count, most = m.choose(
                turn.active,
                "i" * (TURN + 4),
                lambda turn=turn: self.mark(task, turn, scale),
                lambda: [zero] * (TURN + 4),
            )
            turn.entries, largest = entries, m.most(largest, most)
            m.write(self.place("counts", self.warp + number * self.warps), [count], self.lane.equals(0))
        if self.shape.item == 1:
            m.write(self.place("largest", self.warp), [largest], self.lane.equals(0))
        m.sync()
        words = self.warp_counts()
        total = m.sum_of_warp(self.sum(words))
        for number, turn in enumerate(turns):
            m.when(turn.active, lambda turn=turn, number=number: self.put(turn, number, words))
        counts = [total & 0xFFFF, total >> 16]
        notes = self.thread.equals(0) & task.notes.equals(1)
        for layer, count in enumerate(counts):
            where = self.at["counts"] + (task.note + layer * most_splits(self.shape, self.config)) * 4
            m.store(where, count, notes if layer == 0 else notes & self.gating)
        m.sync()
        return counts

    def norm_scale(self) -> list[Any]:
        """One over the root of the mean square of the stream, from the warps' sums."""
        m = self.m
        squares = [m.as_float(word) for w in range(0, self.warps, 4) for word in m.read_four(self.place("warps", w))]
        return [m.reciprocal_root(self.sum(squares) * (1.0 / self.shape.hidden) + self.shape.eps)]

    def mark(self, task: Any, turn: Turn, scale: Any) -> list[Any]:
        """A lane's entries, which of them are kept as bits, how many in the lanes before, in the warp, and the largest.

        Gate's count has the lower 16 bits of a word, up's the upper ones; up's bits are above gate's.
        """
        m, normed = self.m, task.normed.equals(1)
        gains = [m.as_float(bits) for word in turn.gains for bits in (word << 16, word & -65536)]
        values = [m.as_float(bits) for word in turn.values for bits in (word << 16, word & -65536)]
        values = [
            m.select(normed, m.rounded(m.rounded(x * scale) * gain), x) for x, gain in zip(values, gains, strict=True)
        ]
        mask, count, zero = m.integer(0), m.integer(0), m.integer(0)
        for layer in range(2):
            here = turn.real if layer == 0 else turn.real & self.gating
            for k, x in enumerate(values):
                keep = (m.absolute(x) >= m.as_float(turn.limits[TURN * layer + k])) & here
                mask = mask + m.select(keep, m.integer(1 << (TURN * layer + k)), zero)
                count = count + m.select(keep, m.integer(1 << (16 * layer)), zero)
        entries = [(m.as_bits(x) & -65536) | (turn.channel + k) for k, x in enumerate(values)]
        largest = zero
        if self.shape.item == 1:
            for x in values:
                largest = m.most(largest, m.as_bits(m.absolute(x)))
            largest = m.highest(largest)
        return [*entries, mask, m.sum_before(count), m.sum_of_warp(count), largest]

    def warp_counts(self) -> list[Any]:
        """The counts of all turns and warps, shared out among the lanes of each warp."""
        m, many = self.m, self.room.turns * self.warps
        words = []
        for first in range(0, many, WARP):
            at = self.lane + first
            words.append(m.select(at < many, m.read(self.place("counts", at)), m.integer(0)))
        return words

    def put(self, turn: Turn, number: int, words: list[Any]) -> None:
        """Write a lane's kept entries behind those of the lanes, warps and turns before."""
        m = self.m
        here = self.warp + number * self.warps
        lower = [
            m.select(self.lane + WARP * i < here, word, m.integer(0)) for i, word in enumerate(words)
        ]  # fmt: skip
        start = m.sum_of_warp(self.sum(lower)) + turn.before

        def some(layer: int) -> None:
            place = ((start >> (16 * layer)) & 0xFFFF) + layer * self.room.second
            for k, entry in enumerate(turn.entries):
                bit = (turn.mask >> (TURN * layer + k)) & 1
                m.write(self.place("lists", place), [entry], bit.equals(1))
                place = place + bit

        some(0)
        m.when(self.gating, lambda: some(1))
