"""The second part of a phase: which channels each layer keeps."""

from __future__ import annotations

from typing import Any

from kernels_pallas.fused_block.base import Base, LaneChannels
from kernels_pallas.fused_block.tiling import CHANNELS_AT_ONCE, COUNTS, MOST_CHANNELS, WARP, most_splits


class Lists(Base):
    """Writes the lists of kept channels."""

    def list_kept(self, task: Any, rounds: list[LaneChannels], scale: Any) -> list[Any]:
        """Write a list for each layer: a word for each kept channel, its number below and its value above.

        The value is a bfloat16, or for integers a float16 of the list's own unit. Where each set of the tile has scales
        of its own, it has lists of its own too, of the value times the scale. Later planes have one list together, the
        second plane's entries before the third's, of the value times the plane's step.

        The channels of a round come before those of the next, a warp's before the next warp's, and a lane's before the
        next lane's. Two counts share a word, gate's and up's.
        """
        m, zero = self.m, self.m.integer(0)
        largest = [zero] * (self.lists if self.integers else 0)
        for first in range(0, len(rounds), 2):
            both, counts = rounds[first : first + 2], [zero] * self.planes
            for k, round_ in enumerate(both):
                many = CHANNELS_AT_ONCE + 2 * self.planes + len(largest)
                found = m.cond(
                    round_.active,
                    "i" * many,
                    lambda round_=round_: self.mark(task, round_, scale),
                    lambda many=many: [zero] * many,
                )
                round_.entries, marked = found[:CHANNELS_AT_ONCE], found[CHANNELS_AT_ONCE:]
                round_.masks = marked[: 2 * self.planes : 2]
                counts = [count | (own << 8 * k) for count, own in zip(counts, marked[1::2], strict=False)]
                largest = [m.maximum(a, b) for a, b in zip(largest, marked[2 * self.planes :], strict=True)]
            found = m.cond(
                both[0].active,
                "ii" * self.planes,
                lambda counts=counts: [word for c in counts for word in (m.prefix_sum(c), m.warp_sum(c))],
                lambda: [zero, zero] * self.planes,
            )
            for k, round_ in enumerate(both):
                round_.before = [(before >> 8 * k) & 0x00FF00FF for before in found[::2]]
            for plane, count in enumerate(found[1::2]):
                at = self.warp + (first // 2 * self.warps + plane * self.layout.counted)
                m.write(self.smem("counts", at), [count], self.lane.equals(0))
        for number, bits in enumerate(largest):
            at = self.smem("largest", self.warp + number * self.warps)
            m.write(at, [m.warp_max(bits)], self.lane.equals(0))
        m.sync()
        words, units = [self.warp_counts(plane) for plane in range(self.planes)], self.units()
        totals = [m.warp_sum(self.sum(own)) for own in words]
        for number, round_ in enumerate(rounds):
            m.when(
                round_.active, lambda round_=round_, number=number: self.put(task, round_, number, words, units, totals)
            )
        counts = [half for total in totals for half in (total & 0xFFFF, total >> 16)]
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
            word = m.read(self.smem("largest", self.lane % self.warps + number * self.warps))
            exponent = m.minimum(m.maximum(m.warp_max(word) >> 23, 16), 254)
            units.append(m.as_float((m.integer(2 * 127 + 14) - exponent) << 23))
            inverse = (exponent - 14) << 23
            m.write(self.smem("norms", number), [inverse], self.thread.equals(0))
        return units

    def close(self, task: Any, counts: list[Any]) -> None:
        """End the warp's list with zeros, as entries are read four at a time, and note its length."""
        m, second = self.m, self.warp.equals(1)
        start = self.list_start(second)
        own = [m.select(second, counts[k + 1], counts[k]) for k in range(0, len(counts), 2)]

        def end(start: Any, count: Any, other: Any) -> None:
            inside = self.lane < ((count ^ 3) + 1) % 4
            m.write(self.smem("lists", start + count + self.lane), [m.integer(0)], inside)
            if self.grouped:
                more = inside & (task.next_scales >= 1)
                m.write(self.smem("lists", start + other + count + self.lane), [m.integer(0)], more)

        end(start, own[0], task.other)
        if self.planes > 1:
            end(self.later_start(start), self.sum(own[1:]), task.other * (self.planes - 1))
        if self.integers:
            m.write(self.smem("ends", self.warp), [own[0]], self.lane.equals(0))
        parts = most_splits(self.shape, self.config)
        words = self.decoder * (COUNTS * parts * self.planes) + task.note + self.warp * (parts * self.planes)
        for plane, count in enumerate(own):
            where = self.at["counts"] + (words + task.plane_note * plane) * 4
            m.store(where, count, self.lane.equals(0) & task.notes.equals(1))

    def mark(self, task: Any, round_: LaneChannels, scale: Any) -> list[Any]:
        """A lane's entries, of each plane which of them are kept as bits and how many, and of integers the bits of each
        list's largest.

        Gate's count has the lower 16 bits of a word, up's the upper ones; up's bits are above gate's.
        """
        m, normed, words = self.m, task.normed.equals(1), []
        for word, gain in zip(round_.values, round_.gains, strict=True):
            low, high = (m.as_float(bits) * scale for bits in (word << 16, word & -65536))
            words.append(m.select(normed, m.multiply_bfloat16_pairs(m.pack_bfloat16(low, high), gain), word))
        values = [bits for word in words for bits in (word << 16, word & -65536)]
        zero, first = m.integer(0), (1 << CHANNELS_AT_ONCE) - 1
        both = m.select(self.gating, m.integer(first << CHANNELS_AT_ONCE | first), m.integer(first))
        above, marked = m.select(round_.valid, both, zero), []
        for thresholds in (round_.thresholds, *round_.later_thresholds):
            mask = zero
            for k, threshold in enumerate(thresholds):
                keep = m.absolute(m.as_float(values[k % CHANNELS_AT_ONCE])) >= self.times_factor(threshold)
                mask = mask | m.select(keep, m.integer(1 << k), zero)
            above = mask & above  # no plane without those above it
            marked += [above, m.popcount(above & first) | (m.popcount(above >> CHANNELS_AT_ONCE) << 16)]
        mask = marked[0]
        entries = [bits | (round_.channel + k) for k, bits in enumerate(values)]
        if not self.integers:
            return [*entries, *marked]
        largest = []
        for number in range(self.lists):
            most, own = zero, self.mask_of(number, mask)
            for k, value in enumerate(self.scaled(round_, number, entries)):
                most = m.maximum(most, m.select((own & (1 << k)).equals(0), zero, m.as_bits(value) & 0x7FFFFFFF))
            largest.append(most)
        return [*entries, *marked, *largest]

    def times_factor(self, threshold: Any) -> Any:
        """The float of the bits of a threshold, times the factor where there is one."""
        number = self.m.as_float(threshold)
        return number if self.factor is None else number * self.factor

    def mask_of(self, number: int, mask: Any) -> Any:
        """Which of a round's channels are in a list: gate's, up's, both of the second set; or one layer's sets."""
        if number % 2 == 0:
            return mask
        upper = mask >> CHANNELS_AT_ONCE
        return self.m.select(self.gating, upper, mask) if self.grouped else upper

    def scaled(self, round_: LaneChannels, number: int, entries: list[Any]) -> list[Any]:
        """The values of a list's entries, times their scales if there are some."""
        m = self.m
        values = [m.as_float(entry & -65536) for entry in entries]
        if not self.grouped:
            return values
        scales = [m.as_float(bits) for word in round_.scales[number] for bits in (word << 16, word & -65536)]
        return [value * scale for value, scale in zip(values, scales, strict=True)]

    def warp_counts(self, plane: int) -> list[Any]:
        """A plane's counts of all rounds and warps, shared out among the lanes of each warp."""
        m, many = self.m, self.layout.rounds * self.warps
        words = []
        for first in range(0, many, WARP):
            at = m.minimum(self.lane + first, many - 1)
            round_, warp = at // self.warps, at % self.warps
            two = m.read(self.smem("counts", warp + (round_ >> 1) * self.warps + plane * self.layout.counted))
            word = (two >> ((round_ & 1) * 8)) & 0x00FF00FF
            words.append(m.select(self.lane + first < many, word, m.integer(0)))
        return words

    def put(
        self, task: Any, round_: LaneChannels, number: int, words: list[list[Any]], units: list[Any], totals: list[Any]
    ) -> None:
        """Write a lane's kept entries behind those of the lanes, warps and rounds before."""
        m = self.m
        here = self.warp + number * self.warps
        before = []
        for own, inside in zip(words, round_.before, strict=True):
            lower = [m.select(self.lane + WARP * i < here, word, m.integer(0)) for i, word in enumerate(own)]
            before.append(m.warp_sum(self.sum(lower)) + inside)
        # The list of later planes has those of the second before those of the third.
        for plane in range(2, self.planes):
            before[plane] = before[plane] + self.sum(totals[1:plane])

        def put_list(number: int) -> None:
            start, second = m.integer(0), number % 2 == 1
            if second:
                start = m.integer(self.layout.second)
                if self.grouped:
                    start = m.select(self.gating, start, task.other)
            if number >= 2:
                start = start + task.other
            values = self.scaled(round_, number, round_.entries)
            for plane in range(self.planes):
                own = before[plane] & 0xFFFF
                if second:
                    own = before[plane] >> 16
                    if self.grouped:
                        own = m.select(self.gating, own, before[plane] & 0xFFFF)
                begin = start if plane == 0 else self.later_start(start)
                at, mask = self.smem("lists", own + begin), self.mask_of(number, round_.masks[plane])
                for k, entry in enumerate(self.entries_of(round_, values, units, number, plane)):
                    at = m.append(at, entry, mask, 1 << k)

        more = task.next_scales >= 1
        put_list(0)
        m.when(self.gating | more if self.grouped else self.gating, lambda: put_list(1))
        for number in range(2, self.lists):
            m.when(self.gating & more, lambda number=number: put_list(number))

    def entries_of(
        self, round_: LaneChannels, values: list[Any], units: list[Any], number: int, plane: int
    ) -> list[Any]:
        """A round's entries of one list and plane."""
        m = self.m
        if not self.integers:
            return round_.entries
        step = self.format.row_forms[plane].step
        numbers = [value * units[number] for value in values]
        numbers = numbers if step == 1 else [value * step for value in numbers]
        pairs = [m.pack_float16(numbers[k], numbers[k + 1]) for k in range(0, CHANNELS_AT_ONCE, 2)]
        upper = [half for pair in pairs for half in (pair << 16, pair & -65536)]
        mark = MOST_CHANNELS if plane == 2 else 0
        return [half | (entry & 0xFFFF) | mark for half, entry in zip(upper, round_.entries, strict=True)]
