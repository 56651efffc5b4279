"""The first part of a phase: what the block's channels hold."""

from __future__ import annotations

from typing import Any

from kernels_pallas.fused_block.base import POST, Base, Turn
from kernels_pallas.fused_block.layout import TURN, WARP

MERGED_AT_ONCE = 16  # splits of attention whose loads are in flight together


class Inputs(Base):
    """Fetches the input of a product."""

    def merge(self) -> None:
        """Attention at the channels of the first phase, from its splits, each lane for itself.

        Before the block knows its tasks, so that both come at once.
        """
        m, p = self.m, self.cuts["attn_out"]
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
            turns.append(Turn(place, channel, active, first < task.channels, limits, [a, b]))
        kinds = "i" * (TURN // 2 * len(turns)) + "f"
        *values, square = m.choose(
            self.merging, kinds, lambda: self.recall(turns), lambda: self.receive(task, turns)
        )  # fmt: skip
        for number, turn in enumerate(turns):
            turn.values = values[TURN // 2 * number : TURN // 2 * (number + 1)]
        (square,) = m.choose(
            self.warp * WARP < self.room.squares, "f", lambda: [self.sum_of_warp(square)], lambda: [m.number(0.0)]
        )
        m.write(self.place("warps", self.warp), [m.as_bits(square)], self.lane.equals(0))
        m.sync()
        return turns

    def recall(self, turns: list[Turn]) -> list[Any]:
        """What the lane merged before, in pairs."""
        m, out = self.m, []
        merged = self.cuts["attn_out"].channels
        for turn in turns:
            words = m.read_four(self.place("merged", m.least(turn.place, merged - TURN)))
            out += [(words[k] >> 16) | (words[k + 1] & -65536) for k in range(0, TURN, 2)]
        return [*out, m.number(0.0)]

    def receive(self, task: Any, turns: list[Turn]) -> list[Any]:
        """What other blocks post of a lane's channels, and one lane's of the sums of the stream's squares."""
        m, room = self.m, self.room
        parts = {name: m.integer(room.exchange[name]) for name in ("middle", "gated", "stream")}
        source = self.by_phase(parts["middle"], parts["middle"], parts["gated"], [parts["stream"]] * 3, task)
        squares = m.select(
            self.last, m.integer(room.exchange["stream squares"]), m.integer(room.exchange["middle squares"])
        )
        at, lane_has = self.at["exchange"], task.normed.equals(1) & (self.thread < room.squares)
        pairs = [(at + (source + turn.channel // 2) * POST, turn.real) for turn in turns]
        single = at + (squares + m.least(self.thread, room.squares - 1)) * POST
        *words, square = m.poll(pairs, [(single, lane_has)], self.tag)
        return [*words, m.as_float(square)]
