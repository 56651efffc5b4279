"""The third part of a phase: the listed channels' product on the tensor cores."""

from __future__ import annotations

from typing import Any

from kernels_pallas.fused_block.base import Base
from kernels_pallas.fused_block.layout import LOAD, QUAD

ENTRIES = 16  # of a list that four lanes take at once
ADDED_AT_ONCE = 4  # rows of a column whose sums are read together


class Products(Base):
    """Multiplies the lists with a tile of columns."""

    def product(self, task: Any, counts: list[Any]) -> Any:
        """The sum of a lane's column: of the tile, or of gate's tile and behind it of up's."""
        m, at = self.m, self.at
        weight = self.by_phase(
            at["weight_o"], at["weight_gate"], at["weight_down"], [at.get(f"weight_{n}") for n in "qkv"], task
        )
        self.multiply(task, counts, weight)
        m.sync()
        of_second = self.thread >= task.columns
        column = m.least(m.select(of_second, self.thread - task.columns, self.thread), task.columns - 1)
        start = m.select(of_second, m.integer(self.threads // QUAD * self.each), m.integer(0))

        def mine() -> list[Any]:
            total = self.column_sum(task, start + column)
            if self.shape.item == 1:
                total = total * self.of_layer("scale", task, column, of_second)
            return [total]

        (total,) = m.choose(self.thread < task.columns * task.lists, "f", mine, lambda: [m.number(0.0)])
        return total

    def of_layer(self, kind: str, task: Any, column: Any, second: Any) -> Any:
        """The scale of a column of the phase's layer."""
        m, at = self.m, self.at
        scale = self.by_phase(
            at[f"{kind}_o"], m.select(second, at[f"{kind}_up"], at[f"{kind}_gate"]), at[f"{kind}_down"],
            [at.get(f"{kind}_{n}") for n in "qkv"], task,
        )  # fmt: skip
        return m.as_float(m.load(scale + (task.first_column + column) * 4))

    def multiply(self, task: Any, counts: list[Any], weight: Any) -> None:
        """Leave the sums of value times weight over each list for `column_sum`.

        Four lanes have one vector of columns and 16 rows of it, which the tensor cores multiply with the 16 values:
        each four is a column of values of its own, and of what the warp's product has only its diagonal is wanted.
        While some rows are being multiplied, as many more are on their way.
        """
        m, unroll = self.m, self.config.unroll
        quad = self.thread // QUAD
        vector, row = quad % task.width, quad // task.width
        offset = task.first_column * self.shape.item + vector * LOAD
        idle = row >= task.rows
        step = task.rows * (2 * unroll * ENTRIES)
        turns = [(count + (step - 1)) // step for count in counts]
        scale, unscale = self.value_scale()

        def fetch(turn: Any, half: int) -> list[Any]:
            # Turns go on from gate's list to up's.
            second = turn >= turns[0]
            own = m.select(second, turn - turns[0], turn)
            count = m.select(idle, m.integer(0), m.select(second, counts[1], counts[0]))
            start = self.place("lists", m.select(second, m.integer(self.room.second), m.integer(0)))
            base = m.select(second, at_up, weight) + offset
            out = []
            for u in range(unroll):
                first = ((own * 2 + half) * unroll + u) * task.rows + row
                first = first * ENTRIES + self.lane % QUAD * QUAD
                entries = m.read_four_or_zeros(start + first * 4, first < count)
                for k, entry in enumerate(entries):
                    real = first + k < count
                    entry = m.select(real, entry, m.integer(0))
                    out += [*m.stream(base + (entry & 0xFFFF) * task.stride, real), entry]
            return out

        at_up = m.select(self.gating, self.at["weight_up"], weight)

        def add(totals: list[Any], read: list[Any]) -> list[Any]:
            for u in range(unroll):
                rows = [read[5 * (QUAD * u + k) : 5 * (QUAD * u + k) + 5] for k in range(QUAD)]
                totals = self.add_rows(totals, rows, scale)
            return totals

        def twice(turn: Any, carry: list[Any]) -> list[Any]:
            totals, first = carry[:held], carry[held:]
            second = fetch(turn, 1)
            totals = add(totals, first)
            first = fetch(turn + 1, 0)
            return [*add(totals, second), *first]

        def one_list(layer: Any, ahead: list[Any]) -> list[Any]:
            before = m.select(layer.equals(0), m.integer(0), turns[0])
            many = m.select(layer.equals(0), turns[0], turns[1])
            zero = [m.number(0.0)] * held
            carry = m.loop(many, [*zero, *ahead], lambda turn, carry: twice(turn + before, carry))
            self.put_sums(carry[:held], layer * (self.threads // QUAD) + quad, unscale)
            return carry[held:]

        held = 4 * self.each // 2 + (4 if self.shape.item == 1 else 0)
        m.loop(task.lists, fetch(m.integer(0), 0), one_list)

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

    def add_rows(self, totals: list[Any], rows: list[list[Any]], scale: Any) -> list[Any]:
        """Multiply four rows a lane, each of four words of weights and an entry of the list."""
        m = self.m
        entries = [row[4] for row in rows]
        if self.shape.item == 2:
            values = [m.permute(entries[k], entries[k + 1], 0x7632) for k in (0, 2)]
            out = []
            for w in range(4):
                a = [m.permute(rows[k][w], rows[k + 1][w], s) for k in (0, 2) for s in (0x5410, 0x7632)]
                out += m.matrix("bf16", a, values, totals[4 * w : 4 * w + 4])
            return out
        numbers = [m.as_float(entry & -65536) * scale for entry in entries]
        values = [m.halves(numbers[k], numbers[k + 1]) for k in (0, 2)]
        positive = [[word ^ -0x7F7F7F80 for word in row[:4]] for row in rows]
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
