"""The third part of a phase: the listed channels' product on the tensor cores."""

from __future__ import annotations

import math
from typing import Any

from kernels_pallas.fused_block.base import Base
from kernels_pallas.fused_block.layout import BATCHES, ENTRIES, LOAD, MOST_CHANNELS, QUAD, SET

BATCH = 4 * QUAD + 2  # words of one: the rows, and their values
ADDED_AT_ONCE = 5  # rows of a column whose sums are read together


class Products(Base):
    """Multiplies the lists with a tile of columns."""

    def total(self, task: Any) -> Any:
        """The sum of a lane's column: of the tile, or of gate's tile and behind it of up's."""
        m = self.m
        of_second, column = self.column(task)
        start = m.select(of_second, m.integer(self.threads // QUAD // 2 * self.each), m.integer(0))

        def mine() -> list[Any]:
            total = self.column_sum(task, start + column)
            if self.integers:
                finite, plain = m.absolute(total) < math.inf, lambda: [self.plain_sum(task, of_second, column)]
                (total,) = m.choose(finite, "f", lambda: [total], plain)
                which = m.select(of_second, m.integer(1), m.integer(0))
                if self.grouped:
                    layers = m.select(self.gating, m.integer(2), m.integer(1))
                    which = which + self.set_of(column // self.each) * layers
                total = total * m.as_float(m.read(self.place("norms", which)))
            if self.shape.kind == "int8":
                total = total * m.as_float(m.read(self.place("scales", self.thread)))
            return [total]

        return m.choose(self.thread < task.columns * task.lists, "f", mine, lambda: [m.number(0.0)])[0]

    def plain_sum(self, task: Any, of_second: Any, column: Any) -> Any:
        """The sum of a column of integers, entry by entry: for infinite values, of which `put_sums` makes NaNs."""
        m, bits = self.m, self.shape.bits
        base = m.read_address(m.select(of_second, self.where("kernel_up"), self.where("kernel_q", task.entry)))
        start = self.list_start(of_second)
        if self.grouped:
            start = start + self.set_of(column // self.each) * task.other
        entries = self.place("lists", start)
        place = column * bits
        word, shift = task.start + (place >> 5) * 4, place & 31

        def add(i: Any, carry: list[Any]) -> list[Any]:
            entry = m.read(entries + i * 4)
            weights = m.load(base + (entry & 0xFFFF) * task.stride + word)
            return [carry[0] + m.upper_half(entry) * self.format.number(m, weights, shift)]

        count = m.read(self.place("ends", m.select(of_second, m.integer(1), m.integer(0))))
        return m.loop(count, [m.number(0.0)], add)[0]

    def multiply(self, task: Any, counts: list[Any]) -> None:
        """Leave the sums of value times weight over each list for `total`.

        Of gate and up each half of the block has one list. Four lanes have one vector of columns and 16 rows of it, and
        a set of four such fours has the same rows. The tensor cores multiply the vectors of a warp's eight fours, two
        columns at a time, with the values; the values of one four of each set are taken in turn and zeros for the
        others, so that what comes out has a place for each of four pairs of columns. While some rows are being
        multiplied, as many more are on their way.
        """
        m = self.m
        upper = self.gating & (self.thread >= self.threads // 2)
        quad = self.thread // QUAD
        own_quad = quad - m.select(upper, m.integer(self.threads // QUAD // 2), m.integer(0))
        row = (own_quad * task.narrow) >> 16
        vector = own_quad - row * task.width
        # Vectors that make up a whole set are those of the last one again, and belong to no column.
        offset = task.start + m.least(vector, task.columns // self.each - 1) * LOAD
        mine = m.select(row < task.rows, row * ENTRIES + self.lane % QUAD * QUAD, m.integer(MOST_CHANNELS))
        own_list = self.list_start(upper) + mine
        if self.grouped:
            own_list = own_list + self.set_of(vector) * task.other
        count = m.select(upper, counts[1], counts[0])
        batches = m.high_product(count + (task.step - 1), task.share)
        constants = self.format.constants(m)
        in_turn = [(self.lane // QUAD % SET).equals(k) for k in range(SET)]
        weight = m.select(upper, self.where("kernel_up"), self.where("kernel_q", task.entry))
        base, lists = m.read_address(weight) + offset, self.place("lists", own_list)

        def fetch(batch: Any) -> list[Any]:
            before = batch * task.step
            # Behind the last entry there are zeros: the first channel's row, which is there, and a value of zero. Loads
            # that some lanes leave out would need registers of their own, which hold zeros before.
            entries = m.read_four_or_zeros(lists + before * 4, before + mine < count)
            rows = [m.stream(base + (entry & 0xFFFF) * task.stride) for entry in entries]
            # The entries' upper halves, the values, as the tensor cores take them.
            values = [m.permute(entries[k], entries[k + 1], 0x7632) for k in (0, 2)]
            return [*(word for row in rows for word in row), *values]

        def one_turn(turn: Any, carry: list[Any], number: int = 0) -> list[Any]:
            # So many batches are on their way while one is multiplied, and the compiler shall not put that off.
            batch, ahead = turn * BATCHES + number, (number + BATCHES - 1) % BATCHES
            new = fetch(batch + (BATCHES - 1))
            m.sync_warp()
            # Each batch has a place of its own, where it stays.
            out = [*carry, *[None] * (held + BATCH * BATCHES - len(carry))]
            to, at = held + ahead * BATCH, held + number * BATCH
            out[to : to + BATCH] = new
            out[:held] = self.add_rows(carry[:held], out[at : at + BATCH], in_turn, constants)
            if number + 1 == BATCHES:
                return out
            kept = held + (BATCHES - 1) * BATCH
            kinds = "f" * held + "i" * (kept - held)
            return m.choose(
                batch + 1 < batches, kinds, lambda: one_turn(turn, out, number + 1)[:kept], lambda: out[:kept]
            )

        held = self.each // 2 + (4 if self.integers else 0)
        ahead = [word for number in range(BATCHES - 1) for word in fetch(m.integer(number))]
        totals = m.loop((batches + (BATCHES - 1)) // BATCHES, [*[m.number(0.0)] * held, *ahead], one_turn)[:held]
        self.put_sums(totals, quad)

    def add_rows(self, totals: list[Any], batch: list[Any], in_turn: list[Any], constants: list[Any]) -> list[Any]:
        """Multiply four rows a lane, of four words of weights each, with their values."""
        m, dtype, out = self.m, self.format.dtype, list(totals)
        rows, values = [batch[4 * k : 4 * k + 4] for k in range(QUAD)], batch[4 * QUAD :]
        masked = [[m.select(turn, value, m.integer(0)) for value in values] for turn in in_turn]
        for i, pair in self.format.pairs(m, rows, constants):
            at = slice(i // SET * 4, i // SET * 4 + 4)
            out[at] = m.matrix(dtype, pair, masked[i % SET], out[at])
        if self.integers:
            ones = [m.integer(0x3C003C00)] * 4
            out[-4:] = m.matrix(dtype, ones, values, out[-4:])
        return out

    def put_sums(self, totals: list[Any], quad: Any) -> None:
        """Leave the sums of a four's columns, which two of its lanes have, four of every eight each."""
        m = self.m
        place = self.lane % QUAD
        has = (place // 2).equals(self.lane // (QUAD * SET))
        for k in range(0, self.each, 8):
            a, c, b, d = totals[k // 2 : k // 2 + 4]  # two of an even column and two of the odd one beside it
            columns = [a, b, c, d]
            if self.format.surplus is not None:
                # The sums of the values by the turn that they were taken in.
                surplus = [totals[-4 + i // 2] * self.format.surplus[i % 2] for i in range(4)]
                columns = [c - s for c, s in zip(columns, surplus, strict=True)]
            words = [m.as_bits(c) for c in columns]
            m.write(self.place("sums", quad * self.each + place % 2 * 4 + k), words, has)

    def column_sum(self, task: Any, start: Any) -> Any:
        """The sum over rows of fours of what stands at `start` in each."""
        m = self.m

        def add_rows(turn: Any, carry: list[Any]) -> list[Any]:
            out = []
            for k, total in enumerate(carry):
                row = turn * ADDED_AT_ONCE + k
                word = m.read_or_zero(self.place("sums", start + row * task.row_columns), row < task.rows)
                out.append(total + m.as_float(word))
            return out

        turns = (task.rows + (ADDED_AT_ONCE - 1)) // ADDED_AT_ONCE
        return self.sum(m.loop(turns, [m.number(0.0)] * ADDED_AT_ONCE, add_rows))
