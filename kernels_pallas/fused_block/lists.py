"""The second part of a phase: which channels each layer keeps."""

from __future__ import annotations

from typing import Any

from kernels_pallas.fused_block.base import Base, Turn
from kernels_pallas.fused_block.layout import COUNTS, TURN, WARP, most_splits


class Lists(Base):
    """Writes the lists of kept channels."""

    def list_kept(self, task: Any, turns: list[Turn], scale: Any) -> list[Any]:
        """Write a list for each layer: a word for each kept channel, its number below and its value above.

        The channels of a turn come before those of the next, a warp's before the next warp's, and a lane's before the
        next lane's. Two counts share a word, gate's and up's.
        """
        m, zero = self.m, self.m.integer(0)
        largest = zero
        for first in range(0, len(turns), 2):
            both, count = turns[first : first + 2], zero
            for k, turn in enumerate(both):
                *turn.entries, turn.mask, kept, most = m.choose(
                    turn.active,
                    "i" * (TURN + 3),
                    lambda turn=turn: self.mark(task, turn, scale),
                    lambda: [zero] * (TURN + 3),
                )
                count, largest = count | (kept << 8 * k), m.most(largest, most)
            before, count = m.choose(
                both[0].active,
                "ii",
                lambda count=count: [m.sum_before(count), m.sum_of_warp(count)],
                lambda: [zero, zero],
            )
            for k, turn in enumerate(both):
                turn.before = (before >> 8 * k) & 0x00FF00FF
            m.write(self.place("counts", self.warp + first // 2 * self.warps), [count], self.lane.equals(0))
        if self.shape.item == 1:
            m.write(self.place("largest", self.warp), [m.highest(largest)], self.lane.equals(0))
        m.sync()
        words = self.warp_counts()
        total = m.sum_of_warp(self.sum(words))
        for number, turn in enumerate(turns):
            m.when(turn.active, lambda turn=turn, number=number: self.put(turn, number, words))
        counts = [total & 0xFFFF, total >> 16]
        m.when(self.warp < task.lists, lambda: self.close(task, counts))
        m.sync()
        return counts

    def close(self, task: Any, counts: list[Any]) -> None:
        """End the warp's list with zeros, as entries are read four at a time, and note its length."""
        m, second = self.m, self.warp.equals(1)
        count, start = m.select(second, counts[1], counts[0]), self.list_start(second)
        m.write(self.place("lists", start + count + self.lane), [m.integer(0)], self.lane < ((count ^ 3) + 1) % 4)
        if self.shape.item == 1:
            m.write(self.place("ends", self.warp), [count], self.lane.equals(0))
        parts = most_splits(self.shape, self.config)
        where = self.at["counts"] + (self.decoder * (COUNTS * parts) + task.note + self.warp * parts) * 4
        m.store(where, count, self.lane.equals(0) & task.notes.equals(1))

    def mark(self, task: Any, turn: Turn, scale: Any) -> list[Any]:
        """A lane's entries, which of them are kept as bits, how many, and the bits of the largest.

        Gate's count has the lower 16 bits of a word, up's the upper ones; up's bits are above gate's.
        """
        m, normed, words = self.m, task.normed.equals(1), []
        for word, gain in zip(turn.values, turn.gains, strict=True):
            low, high = (m.as_float(bits) * scale for bits in (word << 16, word & -65536))
            words.append(m.select(normed, m.product_of_pairs(m.packed(low, high), gain), word))
        values = [bits for word in words for bits in (word << 16, word & -65536)]
        mask, zero, largest = m.integer(0), m.integer(0), m.integer(0)
        for k, limit in enumerate(turn.limits):
            keep = m.absolute(m.as_float(values[k % TURN])) >= m.as_float(limit)
            mask = mask | m.select(keep, m.integer(1 << k), zero)
        first = (1 << TURN) - 1
        both = m.select(self.gating, m.integer(first << TURN | first), m.integer(first))
        mask = mask & m.select(turn.real, both, zero)
        count = m.count_bits(mask & first) | (m.count_bits(mask >> TURN) << 16)
        if self.shape.item == 1:
            for bits in values:
                largest = m.most(largest, bits & 0x7FFFFFFF)
        entries = [bits | (turn.channel + k) for k, bits in enumerate(values)]
        return [*entries, mask, count, largest]

    def warp_counts(self) -> list[Any]:
        """The counts of all turns and warps, shared out among the lanes of each warp."""
        m, many = self.m, self.room.looks * self.warps
        words = []
        for first in range(0, many, WARP):
            at = m.least(self.lane + first, many - 1)
            turn, warp = at // self.warps, at % self.warps
            two = m.read(self.place("counts", warp + (turn >> 1) * self.warps))
            word = (two >> ((turn & 1) * 8)) & 0x00FF00FF
            words.append(m.select(self.lane + first < many, word, m.integer(0)))
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
            place = self.place("lists", ((start >> (16 * layer)) & 0xFFFF) + layer * self.room.second)
            for k, entry in enumerate(turn.entries):
                place = m.append(place, entry, turn.mask, 1 << (TURN * layer + k))

        some(0)
        m.when(self.gating, lambda: some(1))
