"""The second part of a phase: which channels each layer keeps."""

from __future__ import annotations

from typing import Any

from kernels_pallas.fused_block.base import Base, LaneChannels
from kernels_pallas.fused_block.layout import CHANNELS_AT_ONCE, COUNTS, WARP, most_splits


class Lists(Base):
    """Writes the lists of kept channels."""

    def list_kept(self, task: Any, turns: list[LaneChannels], scale: Any) -> list[Any]:
        """Write a list for each layer: a word for each kept channel, its number below and its value above.

        The value is a bfloat16, or for integers a float16 of the list's own unit. Where each set of the tile has scales
        of its own, it has lists of its own too, of the value times the scale.

        The channels of a turn come before those of the next, a warp's before the next warp's, and a lane's before the
        next lane's. Two counts share a word, gate's and up's.
        """
        m, zero = self.m, self.m.integer(0)
        largest = [zero] * (self.lists if self.integers else 0)
        for first in range(0, len(turns), 2):
            both, count = turns[first : first + 2], zero
            for k, turn in enumerate(both):
                many = CHANNELS_AT_ONCE + 2 + len(largest)
                found = m.choose(
                    turn.active,
                    "i" * many,
                    lambda turn=turn: self.mark(task, turn, scale),
                    lambda many=many: [zero] * many,
                )
                turn.entries, turn.mask = found[:CHANNELS_AT_ONCE], found[CHANNELS_AT_ONCE]
                count = count | (found[CHANNELS_AT_ONCE + 1] << 8 * k)
                largest = [m.most(a, b) for a, b in zip(largest, found[CHANNELS_AT_ONCE + 2 :], strict=True)]
            before, count = m.choose(
                both[0].active,
                "ii",
                lambda count=count: [m.sum_before(count), m.sum_of_warp(count)],
                lambda: [zero, zero],
            )
            for k, turn in enumerate(both):
                turn.before = (before >> 8 * k) & 0x00FF00FF
            m.write(self.place("counts", self.warp + first // 2 * self.warps), [count], self.lane.equals(0))
        for number, bits in enumerate(largest):
            place = self.place("largest", self.warp + number * self.warps)
            m.write(place, [m.highest(bits)], self.lane.equals(0))
        m.sync()
        words, units = self.warp_counts(), self.units()
        total = m.sum_of_warp(self.sum(words))
        for number, turn in enumerate(turns):
            m.when(turn.active, lambda turn=turn, number=number: self.put(task, turn, number, words, units))
        counts = [total & 0xFFFF, total >> 16]
        m.when(self.warp < task.lists, lambda: self.close(task, counts))
        m.sync()
        return counts

    def units(self) -> list[Any]:
        """What each list's values are multiplied with so that the largest fits in float16; its inverse is noted.

        The exponents of 2^(14 - e) and 2^(e - 14), for a largest value between 2^e and 2^(e + 1). Beside an infinite
        value no other counts.
        """
        m, units = self.m, []
        for number in range(self.lists if self.integers else 0):
            word = m.read(self.place("largest", self.lane % self.warps + number * self.warps))
            exponent = m.least(m.most(m.highest(word) >> 23, 16), 254)
            units.append(m.as_float((m.integer(2 * 127 + 14) - exponent) << 23))
            inverse = (exponent - 14) << 23
            m.write(self.place("norms", number), [inverse], self.thread.equals(0))
        return units

    def close(self, task: Any, counts: list[Any]) -> None:
        """End the warp's list with zeros, as entries are read four at a time, and note its length."""
        m, second = self.m, self.warp.equals(1)
        count, start = m.select(second, counts[1], counts[0]), self.list_start(second)
        inside = self.lane < ((count ^ 3) + 1) % 4
        m.write(self.place("lists", start + count + self.lane), [m.integer(0)], inside)
        if self.grouped:
            more = inside & (task.next_scales >= 1)
            m.write(self.place("lists", start + task.other + count + self.lane), [m.integer(0)], more)
        if self.integers:
            m.write(self.place("ends", self.warp), [count], self.lane.equals(0))
        parts = most_splits(self.shape, self.config)
        where = self.at["counts"] + (self.decoder * (COUNTS * parts) + task.note + self.warp * parts) * 4
        m.store(where, count, self.lane.equals(0) & task.notes.equals(1))

    def mark(self, task: Any, turn: LaneChannels, scale: Any) -> list[Any]:
        """A lane's entries, which of them are kept as bits, how many, and of integers the bits of each list's largest.

        Gate's count has the lower 16 bits of a word, up's the upper ones; up's bits are above gate's.
        """
        m, normed, words = self.m, task.normed.equals(1), []
        for word, gain in zip(turn.values, turn.gains, strict=True):
            low, high = (m.as_float(bits) * scale for bits in (word << 16, word & -65536))
            words.append(m.select(normed, m.product_of_pairs(m.packed(low, high), gain), word))
        values = [bits for word in words for bits in (word << 16, word & -65536)]
        mask, zero = m.integer(0), m.integer(0)
        for k, limit in enumerate(turn.limits):
            keep = m.absolute(m.as_float(values[k % CHANNELS_AT_ONCE])) >= m.as_float(limit)
            mask = mask | m.select(keep, m.integer(1 << k), zero)
        first = (1 << CHANNELS_AT_ONCE) - 1
        both = m.select(self.gating, m.integer(first << CHANNELS_AT_ONCE | first), m.integer(first))
        mask = mask & m.select(turn.real, both, zero)
        count = m.count_bits(mask & first) | (m.count_bits(mask >> CHANNELS_AT_ONCE) << 16)
        entries = [bits | (turn.channel + k) for k, bits in enumerate(values)]
        if not self.integers:
            return [*entries, mask, count]
        largest = []
        for number in range(self.lists):
            most, own = zero, self.mask_of(number, mask)
            for k, value in enumerate(self.scaled(turn, number, entries)):
                most = m.most(most, m.select((own & (1 << k)).equals(0), zero, m.as_bits(value) & 0x7FFFFFFF))
            largest.append(most)
        return [*entries, mask, count, *largest]

    def mask_of(self, number: int, mask: Any) -> Any:
        """Which of a turn's channels are in a list: gate's, up's, both of the second set; or one layer's sets."""
        if number % 2 == 0:
            return mask
        upper = mask >> CHANNELS_AT_ONCE
        return self.m.select(self.gating, upper, mask) if self.grouped else upper

    def scaled(self, turn: LaneChannels, number: int, entries: list[Any]) -> list[Any]:
        """The values of a list's entries, times their scales if there are some."""
        m = self.m
        values = [m.as_float(entry & -65536) for entry in entries]
        if not self.grouped:
            return values
        scales = [m.as_float(bits) for word in turn.scales[number] for bits in (word << 16, word & -65536)]
        return [value * scale for value, scale in zip(values, scales, strict=True)]

    def warp_counts(self) -> list[Any]:
        """The counts of all turns and warps, shared out among the lanes of each warp."""
        m, many = self.m, self.places.rounds * self.warps
        words = []
        for first in range(0, many, WARP):
            at = m.least(self.lane + first, many - 1)
            turn, warp = at // self.warps, at % self.warps
            two = m.read(self.place("counts", warp + (turn >> 1) * self.warps))
            word = (two >> ((turn & 1) * 8)) & 0x00FF00FF
            words.append(m.select(self.lane + first < many, word, m.integer(0)))
        return words

    def put(self, task: Any, turn: LaneChannels, number: int, words: list[Any], units: list[Any]) -> None:
        """Write a lane's kept entries behind those of the lanes, warps and turns before."""
        m = self.m
        here = self.warp + number * self.warps
        lower = [
            m.select(self.lane + WARP * i < here, word, m.integer(0)) for i, word in enumerate(words)
        ]  # fmt: skip
        before = m.sum_of_warp(self.sum(lower)) + turn.before

        def put_list(number: int) -> None:
            own, start = before & 0xFFFF, m.integer(0)
            if number % 2 == 1:
                own, start = before >> 16, m.integer(self.places.second)
                if self.grouped:
                    own = m.select(self.gating, own, before & 0xFFFF)
                    start = m.select(self.gating, start, task.other)
            if number >= 2:
                start = start + task.other
            place, mask = self.place("lists", own + start), self.mask_of(number, turn.mask)
            entries = turn.entries
            if self.integers:
                numbers = [value * units[number] for value in self.scaled(turn, number, entries)]
                pairs = [m.halves(numbers[k], numbers[k + 1]) for k in range(0, CHANNELS_AT_ONCE, 2)]
                upper = [half for pair in pairs for half in (pair << 16, pair & -65536)]
                entries = [half | (entry & 0xFFFF) for half, entry in zip(upper, entries, strict=True)]
            for k, entry in enumerate(entries):
                place = m.append(place, entry, mask, 1 << k)

        more = task.next_scales >= 1
        put_list(0)
        m.when(self.gating | more if self.grouped else self.gating, lambda: put_list(1))
        for number in range(2, self.lists):
            m.when(self.gating & more, lambda number=number: put_list(number))
