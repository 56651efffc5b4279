"""The third part of a phase: the listed channels' product on the tensor cores."""

from __future__ import annotations

import math
from typing import Any

from kernels_pallas.formats import Format
from kernels_pallas.fused_block.base import Base
from kernels_pallas.fused_block.tiling import BATCHES, ENTRIES, LOAD, MOST_CHANNELS, QUAD, SET

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
                (total,) = m.cond(finite, "f", lambda: [total], plain)
                which = m.select(of_second, m.integer(1), m.integer(0))
                if self.grouped:
                    layers = m.select(self.gating, m.integer(2), m.integer(1))
                    which = which + self.set_of(column // self.each) * layers
                total = total * m.as_float(m.read(self.smem("norms", which)))
            if self.format.column_scales:
                total = total * m.as_float(m.read(self.smem("scales", self.thread)))
            return [total]

        return m.cond(self.thread < task.columns * task.lists, "f", mine, lambda: [m.float32(0.0)])[0]

    def plain_sum(self, task: Any, of_second: Any, column: Any) -> Any:
        """The sum of a column of integers, entry by entry: for infinite values, of which `put_sums` makes NaNs.

        Of planes the first one's alone, which has the weight's sign.
        """
        m, bits = self.m, self.shape.bits
        base = m.read_address(m.select(of_second, self.where("kernel_up"), self.where("kernel_q", task.entry)))
        start = self.list_start(of_second)
        if self.grouped:
            start = start + self.set_of(column // self.each) * task.other
        entries = self.smem("lists", start)
        first = column * bits
        word, shift = task.start + (first >> 5) * 4, first & 31

        def add(i: Any, carry: list[Any]) -> list[Any]:
            entry = m.read(entries + i * 4)
            weights = m.load(base + (entry & 0xFFFF) * task.stride + word)
            return [carry[0] + m.upper_float16(entry) * self.rows.number(m, weights, shift)]

        count = m.read(self.smem("ends", m.select(of_second, m.integer(1), m.integer(0))))
        return m.for_loop(count, [m.float32(0.0)], add)[0]

    def multiply(self, task: Any, counts: list[Any]) -> None:
        """Leave the sums of value times weight over each list for `total`.

        Of gate and up each half of the CTA has one list. A quad of lanes has one vector of columns and 16 rows of it,
        and a set of four quads has the same rows. The tensor cores multiply the vectors of a warp's eight quads, two
        columns at a time, with the values: one instruction takes those of one quad of each set, and zeros for the
        other quads, so that what comes out has room for each of four pairs of columns. While some rows are being
        multiplied, as many more are on their way.
        """
        m = self.m
        upper = self.gating & (self.thread >= self.threads // 2)
        quad = self.thread // QUAD
        own_quad = quad - m.select(upper, m.integer(self.threads // QUAD // 2), m.integer(0))
        row = (own_quad * task.narrow) >> 16
        vector = own_quad - row * task.width
        # Vectors that make up a whole set are those of the last one again, and belong to no column.
        offset = task.start + m.minimum(vector, task.columns // self.each - 1) * LOAD
        mine = m.select(row < task.rows, row * ENTRIES + self.lane % QUAD * QUAD, m.integer(MOST_CHANNELS))
        start = self.list_start(upper)
        if self.grouped:
            start = start + self.set_of(vector) * task.other
        quad_masks = [(self.lane // QUAD % SET).equals(k) for k in range(SET)]

        def base(name: str) -> Any:
            return m.read_address(m.select(upper, self.where(f"{name}_up"), self.where(f"{name}_q", task.entry)))

        first = base("kernel") + offset
        count = m.select(upper, counts[1], counts[0])
        kinds = self.rows, LOAD // 4
        totals = [m.float32(0.0)] * (self.each // 2)
        totals, values = self.walk(task, kinds, start, mine, count, quad_masks, totals, lambda entry: (
            first + (entry & 0xFFFF) * task.stride
        ))  # fmt: skip
        sums = [(values, self.rows.surplus)]
        if self.planes > 1:
            beside = task.later_start + m.minimum(vector, task.columns // self.each - 1) * (4 * self.later_words)
            planes = [base(f"plane{k}") + beside for k in range(1, self.planes)]

            def later_row(entry: Any) -> Any:
                at = planes[0]
                if len(planes) > 1:
                    at = m.select((entry & MOST_CHANNELS).equals(0), planes[0], planes[1])
                return at + (entry & (MOST_CHANNELS - 1)) * task.later_stride

            count = self.sum([m.select(upper, counts[k + 1], counts[k]) for k in range(2, len(counts), 2)])
            kinds = self.later_rows, self.later_words
            # The lists of the later planes have room for each of them.
            totals, values = self.walk(task, kinds, self.later_start(start), mine, count, quad_masks, totals, later_row)
            sums.append((values, self.later_rows.surplus))
        self.put_sums(totals, sums, quad)

    def walk(
        self, task: Any, kinds: tuple[Format, int], start: Any, mine: Any, count: Any, quad_masks: list[Any],
        totals: list[Any], row: Any,
    ) -> tuple[list[Any], list[Any]]:  # fmt: skip
        """Add up the products of one list: the sums of the columns, and of integers those of the values.

        Args:
            task: of the CTA.
            kinds: the format of the rows, and the words of a row that a lane reads.
            start: of the list.
            mine: the lane's first entry of a batch.
            count: entries of the list.
            quad_masks: whether the lane is in the first, second, third, fourth quad of its set.
            totals: of the columns so far.
            row: where the lane's part of an entry's row is.
        """
        m, (form, words) = self.m, kinds
        batch_words, wide = words * QUAD + 2, len(totals)
        batches = m.multiply_high(count + (task.step - 1), task.share)
        constants, lists = form.constants(m), self.smem("lists", start + mine)

        def fetch(batch: Any) -> list[Any]:
            before = batch * task.step
            # Behind the last entry there are zeros: the first channel's row, which is there, and a value of zero. Loads
            # that some lanes leave out would need registers of their own, which hold zeros before.
            entries = m.read_four_or_zeros(lists + before * 4, before + mine < count)
            rows = [m.stream(row(entry)) if words == LOAD // 4 else m.stream_two(row(entry)) for entry in entries]
            # The entries' upper halves, the values, as the tensor cores take them.
            values = [m.permute_bytes(entries[k], entries[k + 1], 0x7632) for k in (0, 2)]
            return [*(word for one in rows for word in one), *values]

        def iteration(i: Any, carry: list[Any], number: int = 0) -> list[Any]:
            # So many batches are on their way while one is multiplied, and the compiler shall not put that off.
            batch, ahead = i * BATCHES + number, (number + BATCHES - 1) % BATCHES
            new = fetch(batch + (BATCHES - 1))
            m.sync_warp()
            # Each batch has registers of its own, where it stays.
            out = [*carry, *[None] * (held + batch_words * BATCHES - len(carry))]
            to, at = held + ahead * batch_words, held + number * batch_words
            out[to : to + batch_words] = new
            out[:held] = self.add_rows(form, carry[:held], out[at : at + batch_words], quad_masks, constants)
            if number + 1 == BATCHES:
                return out
            kept = held + (BATCHES - 1) * batch_words
            kinds = "f" * held + "i" * (kept - held)
            return m.cond(batch + 1 < batches, kinds, lambda: iteration(i, out, number + 1)[:kept], lambda: out[:kept])

        held = wide + (4 if self.integers else 0)
        ahead = [word for number in range(BATCHES - 1) for word in fetch(m.integer(number))]
        begin = [*totals, *[m.float32(0.0)] * (held - wide), *ahead]
        found = m.for_loop((batches + (BATCHES - 1)) // BATCHES, begin, iteration)[:held]
        return found[:wide], found[wide:]

    def add_rows(
        self, form: Format, totals: list[Any], batch: list[Any], quad_masks: list[Any], constants: list[Any]
    ) -> list[Any]:
        """Multiply four rows a lane, of a few words of weights each, with their values."""
        m, dtype, out, words = self.m, self.multiplied, list(totals), (len(batch) - 2) // QUAD
        rows, values = [batch[words * k : words * (k + 1)] for k in range(QUAD)], batch[words * QUAD :]
        masked = [[m.select(selected, value, m.integer(0)) for value in values] for selected in quad_masks]
        for i, pair in form.pairs(m, rows, constants):
            at = slice(i // SET * 4, i // SET * 4 + 4)
            out[at] = m.mma(dtype, pair, masked[i % SET], out[at])
        if self.integers:
            ones = [m.integer(0x3C003C00)] * 4
            out[-4:] = m.mma(dtype, ones, values, out[-4:])
        return out

    def put_sums(self, totals: list[Any], sums: list[tuple[list[Any], Any]], quad: Any) -> None:
        """Leave the sums of a quad's columns, which two of its lanes have, four of every eight each."""
        m = self.m
        member = self.lane % QUAD
        has = (member // 2).equals(self.lane // (QUAD * SET))
        for k in range(0, self.each, 8):
            a, c, b, d = totals[k // 2 : k // 2 + 4]  # two of an even column and two of the odd one beside it
            columns = [a, b, c, d]
            for values, surplus in sums:
                # The sums of the values, quad by quad of the set.
                if surplus is not None:
                    columns = [c - values[i // 2] * surplus[i % 2] for i, c in enumerate(columns)]
            words = [m.as_bits(c) for c in columns]
            m.write(self.smem("sums", quad * self.each + member % 2 * 4 + k), words, has)

    def column_sum(self, task: Any, start: Any) -> Any:
        """The sum over rows of quads of what stands at `start` in each."""
        m = self.m

        def add_rows(i: Any, carry: list[Any]) -> list[Any]:
            out = []
            for k, total in enumerate(carry):
                row = i * ADDED_AT_ONCE + k
                word = m.read_or_zero(self.smem("sums", start + row * task.row_columns), row < task.rows)
                out.append(total + m.as_float(word))
            return out

        iterations = (task.rows + (ADDED_AT_ONCE - 1)) // ADDED_AT_ONCE
        return self.sum(m.for_loop(iterations, [m.float32(0.0)] * ADDED_AT_ONCE, add_rows))
