"""The third part of a phase: the listed channels' product on the tensor cores."""

from __future__ import annotations

import math
from typing import Any

from kernels_pallas.fused_block.base import Base
from kernels_pallas.fused_block.layout import BATCHES, ENTRIES, LOAD, MOST_CHANNELS, QUAD, WARP

BATCH = 4 * QUAD + 2  # words of one: the rows, and their values
ADDED_AT_ONCE = 5  # rows of a column whose sums are read together


class Products(Base):
    """Multiplies the lists with a tile of columns."""

    def total(self, task: Any) -> Any:
        """The sum of a lane's column: of the tile, or of gate's tile and behind it of up's."""
        m = self.m
        of_second, column = self.column(task)
        start = m.select(of_second, m.integer(self.threads // QUAD * self.each), m.integer(0))

        def mine() -> list[Any]:
            total = self.column_sum(task, start + column)
            if self.shape.item == 1:
                finite, plain = m.absolute(total) < math.inf, lambda: [self.plain_sum(task, of_second, column)]
                (total,) = m.choose(finite, "f", lambda: [total], plain)
                total = total * m.as_float(m.read(self.place("scales", self.thread)))
            return [total]

        return m.choose(self.thread < task.columns * task.lists, "f", mine, lambda: [m.number(0.0)])[0]

    def plain_sum(self, task: Any, of_second: Any, column: Any) -> Any:
        """The sum of a column of int8 weights, entry by entry: for infinite values, of which `put_sums` makes NaNs."""
        m = self.m
        base = m.read_address(m.select(of_second, self.where("kernel_up"), self.where("kernel_q", task.entry)))
        entries = self.place("lists", self.list_start(of_second))
        byte = task.start + column
        word, shift = byte & -4, (byte & 3) * 8

        def add(i: Any, carry: list[Any]) -> list[Any]:
            entry = m.read(entries + i * 4)
            weights = m.load(base + (entry & 0xFFFF) * task.stride + word)
            # As the lowest byte of the float32 2^23, 128 too much.
            weight = m.as_float(((weights >> shift) & 0xFF ^ 0x80) | 0x4B000000) - (2.0**23 + 128)
            return [carry[0] + m.as_float(entry & -65536) * weight]

        count = m.read(self.place("ends", m.select(of_second, m.integer(1), m.integer(0))))
        return m.loop(count, [m.number(0.0)], add)[0]

    def multiply(self, task: Any, counts: list[Any]) -> None:
        """Leave the sums of value times weight over each list for `total`.

        Four lanes have one vector of columns and 16 rows of it, which the tensor cores multiply with the 16 values:
        each four is a column of values of its own, and of what the warp's product has only its diagonal is wanted.
        While some rows are being multiplied, as many more are on their way.
        """
        m = self.m
        weights = [self.where("kernel_q", task.entry), self.where("kernel_up")]
        quad = self.thread // QUAD
        row = (quad * task.narrow) >> 16
        vector = quad - row * task.width
        offset = task.start + vector * LOAD
        mine = m.select(row < task.rows, row * ENTRIES + self.lane % QUAD * QUAD, m.integer(MOST_CHANNELS))
        full = task.rows * task.width >= (self.warp + 1) * (WARP // QUAD)  # whether all lanes of the warp have a row
        turns = [m.high_product(count + (task.step * BATCHES - 1), task.share) for count in counts]
        scale, unscale = self.value_scale()

        def fetch(turn: Any, batch: int) -> list[Any]:
            # Turns go on from gate's list to up's.
            second = turn >= turns[0]
            own = m.select(second, turn - turns[0], turn)
            before = (own * BATCHES + batch) * task.step
            count = m.select(second, counts[1], counts[0])
            place = self.place("lists", self.list_start(second) + before + mine)
            base = m.read_address(m.select(second, weights[1], weights[0])) + offset

            def rows(entries: list[Any], real: Any = None) -> list[Any]:
                found = [m.stream(base + (entry & 0xFFFF) * task.stride, real) for entry in entries]
                return [*entries, *(word for row in found for word in row)]

            def some() -> list[Any]:
                real = before + mine < count
                return rows(m.read_four_or_zeros(place, real), real)

            # A branch of its own for the usual case: fewer instructions.
            all_real = full & (count >= before + task.step)
            words = m.choose(all_real, "i" * (QUAD + 4 * QUAD), lambda: rows(m.read_four(place)), some)
            return [*words[QUAD:], *self.values(words[:QUAD], scale)]

        def one_turn(turn: Any, left: Any, carry: list[Any], batch: int = 0) -> list[Any]:
            # So many batches are on their way while one is multiplied, and the compiler shall not put that off.
            ahead = batch + BATCHES - 1
            new = fetch(turn + ahead // BATCHES, ahead % BATCHES)
            m.sync_warp()
            # Each batch has a place of its own, where it stays.
            out = [*carry, *[None] * (held + BATCH * BATCHES - len(carry))]
            to, at = held + ahead % BATCHES * BATCH, held + batch * BATCH
            out[to : to + BATCH] = new
            out[:held] = self.add_rows(carry[:held], out[at : at + BATCH])
            if batch + 1 == BATCHES:
                return out
            more = left >= task.step * (batch + 1) + 1
            kept = held + (BATCHES - 1) * BATCH
            kinds = "f" * held + "i" * (kept - held)
            return m.choose(more, kinds, lambda: one_turn(turn, left, out, batch + 1)[:kept], lambda: out[:kept])

        def one_list(layer: Any, ahead: list[Any]) -> list[Any]:
            first = layer.equals(0)
            before = m.select(first, m.integer(0), turns[0])
            many = m.select(first, turns[0], turns[1])
            # What follows is on its way already, so all of a turn's batches are taken but in the last list.
            count = m.select(task.lists.equals(layer + 1), m.select(first, *counts), m.integer(MOST_CHANNELS))
            zero = [m.number(0.0)] * held
            carry = m.loop(
                many,
                [*zero, *ahead],
                lambda turn, carry: one_turn(turn + before, count - turn * (task.step * BATCHES), carry),
            )
            self.put_sums(carry[:held], layer * (self.threads // QUAD) + quad, unscale)
            return carry[held:]

        held = 4 * self.each // 2 + (4 if self.shape.item == 1 else 0)
        ahead = [word for batch in range(BATCHES - 1) for word in fetch(m.integer(0), batch)]
        m.loop(task.lists, ahead, one_list)

    def values(self, entries: list[Any], scale: Any) -> list[Any]:
        """Four entries' values, as the tensor cores take them."""
        m = self.m
        if self.shape.item == 2:
            return [m.permute(entries[k], entries[k + 1], 0x7632) for k in (0, 2)]
        numbers = [m.as_float(entry & -65536) * scale for entry in entries]
        return [m.halves(numbers[k], numbers[k + 1]) for k in (0, 2)]

    def value_scale(self) -> tuple[Any, Any]:
        """What int8 weights' values are multiplied with so that the largest fits in float16, and its inverse."""
        m = self.m
        if self.shape.item != 1:
            return None, None
        highest = m.integer(0)
        for w in range(0, self.warps, 4):
            for word in m.read_four(self.place("largest", w)):
                highest = m.most(highest, word)
        # The exponents of 2^(14 - e) and 2^(e - 14), for a largest value between 2^e and 2^(e + 1), if it is finite.
        exponent = m.most(highest >> 23, 16)
        finite = exponent < 255
        scale = m.select(finite, m.integer(2 * 127 + 14) - exponent, m.integer(127))
        unscale = m.select(finite, exponent - 14, m.integer(127))
        return m.as_float(scale << 23), m.as_float(unscale << 23)

    def add_rows(self, totals: list[Any], batch: list[Any]) -> list[Any]:
        """Multiply four rows a lane, of four words of weights each, with their values."""
        m = self.m
        rows, values = [batch[4 * k : 4 * k + 4] for k in range(QUAD)], batch[4 * QUAD :]
        if self.shape.item == 2:
            out = []
            for w in range(4):
                out += m.matrix("bf16", self.fragments(rows, w), values, totals[4 * w : 4 * w + 4])
            return out
        positive = [[word ^ -0x7F7F7F80 for word in row] for row in rows]
        magic, out = m.integer(0x64646464), []
        for w in range(4):
            # The bytes of two rows side by side, then each as the lowest byte of the float16 1024: 1152 too much.
            pairs = [m.permute(positive[k][w], positive[k + 1][w], s) for s in (0x5140, 0x7362) for k in (0, 2)]
            for h in range(2):
                a = [m.permute(pair, magic, s) for pair in pairs[2 * h : 2 * h + 2] for s in (0x4140, 0x4342)]
                at = 4 * (2 * w + h)
                out += m.matrix("f16", a, values, totals[at : at + 4])
        ones = [m.integer(0x3C003C00)] * 4
        return out + m.matrix("f16", ones, values, totals[4 * 2 * 4 :])

    def put_sums(self, totals: list[Any], quad: Any, unscale: Any) -> None:
        """Leave the diagonal of the warp's products, which in each four one lane has."""
        m = self.m
        g = self.lane // QUAD
        odd, has = (g % 2).equals(1), (self.lane % QUAD).equals(g // 2)
        products = [m.select(odd, totals[k + 1], totals[k]) for k in range(0, len(totals), 2)]
        columns = products[: self.each]
        if self.shape.item == 1:
            surplus = products[self.each] * 1152.0
            columns = [(c - surplus) * unscale for c in columns]
        for k in range(0, self.each, 4):
            words = [m.as_bits(c) for c in columns[k : k + 4]]
            m.write(self.place("sums", quad * self.each + k), words, has)

    def column_sum(self, task: Any, start: Any) -> Any:
        """The sum over rows of fours of what stands at `start` in each."""
        m = self.m

        def some(turn: Any, carry: list[Any]) -> list[Any]:
            out = []
            for k, total in enumerate(carry):
                row = turn * ADDED_AT_ONCE + k
                word = m.read_or_zero(self.place("sums", start + row * task.columns), row < task.rows)
                out.append(total + m.as_float(word))
            return out

        turns = (task.rows + (ADDED_AT_ONCE - 1)) // ADDED_AT_ONCE
        return self.sum(m.loop(turns, [m.number(0.0)] * ADDED_AT_ONCE, some))
