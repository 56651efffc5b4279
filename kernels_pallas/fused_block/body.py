"""The kernel, lane by lane: everything of the decoder between the attention of one block and that of the next.

All blocks of threads run at once and walk through the same phases, one product each:

    o                     of attention, whose splits are merged     -> partial sums posted, added to the stream
    gate and up           of the normed stream                      -> silu(gate) * up posted
    down                  of that                                   -> partial sums posted, added to the stream
    q, k and v            of the stream, normed for the next block  -> partial sums for its attention

A phase lists the channels that its layers keep, then multiplies one tile of columns with the channels of one split.
The lanes stand side by side over the tile's vectors of 16 bytes, in as many rows as there are lanes for; what they
read they add up in registers. All phases run the same instructions in a loop: a launch runs each phase once, and
instructions that are not in the processor's cache have to be fetched like the weights.

Where a phase needs what all blocks made in the phase before, values travel through device memory as posts: eight bytes
that hold a word and a tag, written and read in one piece, so that who finds the tag has the value, and no barrier is
needed. The tags of a launch are its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from kernels_pallas.fused_block.config import (
    LOAD,
    PHASES,
    QUAD,
    TURN,
    WARP,
    Config,
    Room,
    Shape,
    Task,
    most_splits,
    products,
    room,
)

POST = 8  # bytes
MERGED_AT_ONCE = 16  # splits of attention whose loads are in flight together
ADDED_AT_ONCE = 4  # rows of a column whose sums are read together
ENTRIES = 16  # of a list that four lanes take at once


@dataclasses.dataclass
class Turn:
    """Four channels of a lane, as integers and conditions of it, and what becomes of them."""

    first: Any  # place in the split
    place: Any  # the same, or the last ones
    channel: Any
    active: Any  # whether any lane of the warp has channels
    real: Any  # whether this lane has
    limits: list[Any]  # of both lists, bits
    gains: list[Any]  # of the norm, in pairs
    values: list[Any] = dataclasses.field(default_factory=list)  # in pairs
    entries: list[Any] = dataclasses.field(default_factory=list)
    mask: Any = None
    before: Any = None


class Block:
    """One launch, as a block of threads sees it. `at` has the address of every array by name."""

    def __init__(self, m: Any, shape: Shape, config: Config, at: dict[str, Any], shared: Any):
        self.m, self.shape, self.config, self.at = m, shape, config, at
        self.room: Room = room(shape, config)
        self.shared = shared
        self.each = LOAD // shape.item
        self.threads, self.warps = config.threads, config.threads // WARP
        self.thread, self.block, self.warp = m.thread(), m.block(), m.warp()
        self.lane = self.thread % WARP
        self.always = self.thread >= 0

    def place(self, name: str, index: Any = 0) -> Any:
        """The address of a word of a part of shared memory."""
        start = self.shared + getattr(self.room, name)
        return start + index * 4 if not isinstance(index, int) else start + 4 * index

    def post_of(self, part: str, index: Any) -> Any:
        """The address of a post."""
        return self.at["exchange"] + (index + self.room.exchange[part]) * POST

    def run(self) -> None:
        """All phases."""
        m, shape = self.m, self.shape
        self.phases = len(PHASES) if shape.sizes_next else len(PHASES) - 1
        m.open_stream()
        self.tag = m.load(self.at["tag"])
        own = self.block * self.room.own + self.thread
        self.owned = m.least(own, shape.hidden - 1)
        self.owns = (self.thread < self.room.own) & (own < shape.hidden)
        x = m.load_bfloat16(self.at["x"] + self.owned * 2)
        words = self.phases * len(Task._fields)
        task = m.load(self.at["tasks"] + (self.block * words + m.least(self.thread, words - 1)) * 4)
        self.merge()
        m.write(self.place("tasks", self.thread), [task], self.thread < words)
        m.write(self.place("stream", self.thread), [m.as_bits(x)], self.thread < self.room.own_lanes)
        m.sync()
        m.loop(m.opaque(self.phases), [], lambda phase, _: self.phase(phase))

    def phase(self, phase: Any) -> list[Any]:
        """One product and what follows it."""
        m = self.m
        words: list[Any] = []
        for k in range(0, len(Task._fields), 4):
            words += m.read_four(self.place("tasks", phase * len(Task._fields) + k))
        task: Any = Task(*words)
        self.merging, self.gating = phase.equals(0), phase.equals(1)
        self.middle, self.last = phase < 2, phase.equals(3)

        def work() -> None:
            counts = self.list_kept(task, self.fetch(task))
            total = self.product(task, counts)
            self.hand_on(task, total)

        m.when(task.working.equals(1), work)
        m.when(self.merging | phase.equals(2), self.add)
        return []

    def by_phase(self, o: Any, gate: Any, down: Any, inputs: Sequence[Any], task: Any) -> Any:
        """What belongs to the phase, and of q, k and v to the layer."""
        m = self.m
        chosen = m.select(self.merging, o, m.select(self.gating, gate, down))
        if not self.shape.sizes_next:
            return chosen
        layer = m.select(task.layer.equals(0), inputs[0], m.select(task.layer.equals(1), inputs[1], inputs[2]))
        return m.select(self.last, layer, chosen)

    # The input

    def merge(self) -> None:
        """Attention at the channels of the first phase, from its splits, each lane for itself.

        Before the block knows its tasks, so that both come at once.
        """
        m, p = self.m, products(self.shape, self.config)["attn_out"]
        split = self.block // sum(p.tiles)
        for turn in range(-(-p.channels // (TURN * self.threads))):
            place = (self.thread + turn * self.threads) * TURN
            channel = m.least(split * p.channels + place, p.size_in - TURN)

            def some(channel: Any = channel, place: Any = place) -> None:
                m.write(self.place("merged", place), [m.as_bits(v) for v in self.merged(channel)])

            m.when((split < p.splits) & (place < p.channels), some)

    def merged(self, channel: Any) -> list[Any]:
        """Attention at four channels of one head."""
        m, shape, at = self.m, self.shape, self.at
        head = channel // (shape.attended // shape.heads)
        top, below, above = m.number(-1e30), m.number(0.0), [m.number(0.0)] * TURN
        for first in range(0, shape.attention_splits, MERGED_AT_ONCE):
            splits = range(first, min(first + MERGED_AT_ONCE, shape.attention_splits))
            tops = [m.as_float(m.load(at["highest"] + (head + s * shape.heads) * 4)) for s in splits]
            weights = [m.as_float(m.load(at["total"] + (head + s * shape.heads) * 4)) for s in splits]
            outs = [m.load_four(at["partial"] + (channel + s * shape.attended) * 4) for s in splits]
            new = top
            for t in tops:
                new = m.most(new, t)
            shrink = m.exp(top - new)
            above, below, top = [a * shrink for a in above], below * shrink, new
            for t, weight, out in zip(tops, weights, outs, strict=True):
                share = m.exp(t - top)
                above = [m.fma(share, m.as_float(o), a) for o, a in zip(out, above, strict=True)]
                below = m.fma(share, weight, below)
        return [m.rounded(a / below) for a in above]

    def fetch(self, task: Any) -> list[Turn]:
        """A lane's channels, four a turn, with their values as they come, thresholds and weights of the norm.

        A warp without channels in a turn is kept from working on it: what is issued for nothing costs as much.
        """
        m, at = self.m, self.at
        following = at.get("limits_next", at["limits_out"])
        row = self.by_phase(at["limits_out"], at["limits_mlp"], at["limits_down"], [following] * 3, task)
        row = row + task.layer * task.size_in * 4
        rows = row, row + m.select(self.gating, task.size_in * 4, m.integer(0))
        gain = m.select(self.last, at.get("norm_next", at["norm_mlp"]), at["norm_mlp"])
        normed, zero = task.normed.equals(1), m.integer(0)
        turns = []
        for number in range(self.room.turns):
            first = (self.thread + number * self.threads) * TURN
            place = m.least(first, task.channels - TURN)
            channel = task.first_channel + place
            active = ((self.warp * WARP) + number * self.threads) * TURN < task.channels

            def words(channel: Any = channel) -> list[Any]:
                limits = [word for r in rows for word in m.load_four(r + channel * 4)]
                return limits + m.load_two(gain + m.select(normed, channel, zero) * 2)

            # On their way before anything is waited for.
            *limits, a, b = m.choose(active, "i" * (2 * TURN + 2), words, lambda: [zero] * (2 * TURN + 2))
            turns.append(Turn(first, place, channel, active, first < task.channels, limits, [a, b]))
        kinds = "i" * (TURN // 2 * len(turns)) + "f"
        *values, square = m.choose(
            self.merging, kinds, lambda: self.recall(turns), lambda: self.receive(task, turns)
        )  # fmt: skip
        for number, turn in enumerate(turns):
            turn.values = values[TURN // 2 * number : TURN // 2 * (number + 1)]

        def of_warp() -> list[Any]:
            total = square
            for distance in (16, 8, 4, 2, 1):
                total = total + m.exchange(total, distance)
            return [total]

        (square,) = m.choose(self.warp * WARP < self.room.squares, "f", of_warp, lambda: [m.number(0.0)])
        m.write(self.place("warps", self.warp), [m.as_bits(square)], self.lane.equals(0))
        m.sync()
        return turns

    def recall(self, turns: list[Turn]) -> list[Any]:
        """What the lane merged before, in pairs."""
        m, out = self.m, []
        merged = products(self.shape, self.config)["attn_out"].channels
        for turn in turns:
            words = m.read_four(self.place("merged", m.least(turn.place, merged - TURN)))
            out += [(words[k] >> 16) | (words[k + 1] & -65536) for k in range(0, TURN, 2)]
        return [*out, m.number(0.0)]

    def receive(self, task: Any, turns: list[Turn]) -> list[Any]:
        """What other blocks post of a lane's channels, and one lane's of the sums of the stream's squares."""
        m, room = self.m, self.room
        names = ("middle", "middle", "gated")
        source = self.by_phase(
            *(m.integer(room.exchange[n]) for n in names), [m.integer(room.exchange["stream"])] * 3, task
        )
        squares = m.select(
            self.last, m.integer(room.exchange["stream squares"]), m.integer(room.exchange["middle squares"])
        )
        at, lane_has = self.at["exchange"], task.normed.equals(1) & (self.thread < room.squares)
        pairs = [(at + (source + turn.channel // 2) * POST, turn.real) for turn in turns]
        single = at + (squares + m.least(self.thread, room.squares - 1)) * POST
        *words, square = m.poll(pairs, [(single, lane_has)], self.tag)
        return [*words, m.as_float(square)]

    # Lists

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
        notes = self.thread.equals(0) & task.counts.equals(1)
        for layer, count in enumerate(counts):
            where = self.at["counts"] + (task.count + layer * most_splits(self.shape, self.config)) * 4
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
            place = ((start >> (16 * layer)) & 0xFFFF) + layer * self.room.capacity
            for k, entry in enumerate(turn.entries):
                bit = (turn.mask >> (TURN * layer + k)) & 1
                m.write(self.place("lists", place), [entry], bit.equals(1))
                place = place + bit

        some(0)
        m.when(self.gating, lambda: some(1))

    @staticmethod
    def sum(terms: Sequence[Any]) -> Any:
        """Of values, two and two."""
        terms = list(terms)
        while len(terms) > 1:
            terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + terms[len(terms) // 2 * 2 :]
        return terms[0]

    # Products

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
            start = self.place("lists", m.select(second, m.integer(self.room.capacity), m.integer(0)))
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

    # Results

    def hand_on(self, task: Any, total: Any) -> None:
        """Post partial sums of the stream, or silu(gate) * up, or store partial sums of q, k and v."""
        m, shape, at = self.m, self.shape, self.at
        inside = self.thread < task.columns
        column = task.first_column + m.least(self.thread, task.columns - 1)
        m.when(self.gating, lambda: self.gate(task, total, column, inside))
        part = m.select(self.merging, m.integer(self.room.exchange["out"]), m.integer(self.room.exchange["down"]))
        where = at["exchange"] + (part + task.out + column) * POST
        adds = phase_adds(self)
        m.post(where, m.as_bits(total), self.tag, inside & adds)
        if shape.sizes_next:
            new = [at[f"new_{n}"] for n in "qkv"]
            where = self.by_phase(new[0], new[0], new[0], new, task) + (task.out + column) * 4
            m.store(where, m.as_bits(total), inside & self.last)

    def gate(self, task: Any, total: Any, column: Any, inside: Any) -> None:
        """Both products in bfloat16 with their biases, their sum's silu, and a post for every two columns."""
        m = self.m
        m.write(self.place("terms", self.thread), [m.as_bits(total)])
        m.sync()
        mine = m.least(self.thread, task.columns - 1)
        both = [m.as_float(m.read(self.place("terms", mine + task.columns * k))) for k in range(2)]
        for k, layer in enumerate(("gate", "up")):
            both[k] = m.rounded(both[k])
            if layer in self.shape.biases:
                both[k] = m.rounded(both[k] + m.load_bfloat16(self.at[f"bias_{layer}"] + column * 2))
        gate, up = both
        hidden = m.rounded(gate / (m.exp(gate * -1.0) + 1.0) * up)
        word = self.pair(hidden)
        m.post(self.post_of("gated", column // 2), word, self.tag, inside & (self.thread % 2).equals(0))

    def pair(self, number: Any) -> Any:
        """This lane's bfloat16 below the next lane's, in a word; for even lanes."""
        m = self.m
        return (m.as_bits(number) >> 16) | (m.as_bits(m.exchange(number, 1)) & -65536)

    def add(self) -> None:
        """Add a product's partial sums to the stream, each block for channels of its own, and post it."""
        m, room, lanes, hidden = self.m, self.room, self.room.own_lanes, self.shape.hidden
        splits = m.select(self.merging, *(m.integer(n) for n in self.added_splits()))
        part = m.select(self.merging, m.integer(room.exchange["out"]), m.integer(room.exchange["down"]))
        split, place = self.thread // lanes, self.thread % lanes
        channel = m.least(self.block * room.own + place, hidden - 1)

        def fetch() -> None:
            where = self.at["exchange"] + (part + split * hidden + channel) * POST
            m.write(self.place("terms", self.thread), m.poll([], [(where, self.always)], self.tag))

        m.when(split < splits, fetch)
        m.sync()
        m.when(self.thread < lanes, lambda: self.add_own(splits))

    def added_splits(self) -> tuple[int, int]:
        """Of o and of down."""
        cuts = products(self.shape, self.config)
        return cuts["attn_out"].splits, cuts["mlp_mid"].splits

    def add_own(self, splits: Any) -> None:
        """The first warps add up the terms."""
        m, room, lanes = self.m, self.room, self.room.own_lanes
        most = max(self.added_splits())
        terms = [
            m.as_float(m.read_or_zero(self.place("terms", self.thread + lanes * s), m.integer(s) < splits))
            for s in range(most)
        ]
        total = m.rounded(self.sum(terms))
        for layer, here in (("o", self.merging), ("down", phase_adds(self) & (self.merging ^ True))):
            if layer in self.shape.biases:
                bias = m.load_bfloat16(self.at[f"bias_{layer}"] + self.owned * 2)
                total = m.select(here, m.rounded(total + bias), total)
        stream = m.rounded(m.as_float(m.read(self.place("stream", self.thread))) + total)
        m.write(self.place("stream", self.thread), [m.as_bits(stream)])
        m.store_bfloat16(self.at["new_x"] + self.owned * 2, stream, self.owns)
        names = ("middle", "middle squares"), ("stream", "stream squares")
        (first, squares) = (
            m.select(self.merging, m.integer(room.exchange[names[0][k]]), m.integer(room.exchange[names[1][k]]))
            for k in range(2)
        )
        word = self.pair(stream)
        where = self.at["exchange"] + (first + self.owned // 2) * POST
        m.post(where, word, self.tag, self.owns & (self.thread % 2).equals(0))
        square = m.select(self.owns, stream * stream, m.number(0.0))
        for distance in (16, 8, 4, 2, 1):
            square = square + m.exchange(square, distance)
        index = self.block * (lanes // WARP) + self.warp
        where = self.at["exchange"] + (squares + index) * POST
        m.post(where, m.as_bits(square), self.tag, self.lane.equals(0) & (index < room.squares))


def phase_adds(block: Block) -> Any:
    """Whether the phase's product is added to the stream."""
    return (block.gating | block.last) ^ True
