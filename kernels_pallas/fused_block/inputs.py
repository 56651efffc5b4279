"""The first part of a phase: what the CTA's channels hold."""

from __future__ import annotations

from typing import Any

from kernels_pallas.fused_block.attention import Attention
from kernels_pallas.fused_block.base import MAILBOX, LaneChannels
from kernels_pallas.fused_block.tiling import CHANNELS_AT_ONCE, ENTERED, WARP


class Inputs(Attention):
    """Fetches the input of a product."""

    def fetch(self, task: Any) -> tuple[list[LaneChannels], Any]:
        """A lane's channels, four a round, with their values as they come, thresholds and weights of the norm.

        The other is what the norm multiplies with, if there is a norm.

        A warp without channels in a round is kept from working on it: what is issued for nothing costs as much.
        """
        m = self.m
        # What is asked for first comes while the CTA waits for its inputs.
        self.factor = m.as_float(m.load(self.at["factor"])) if "factor" in self.at else None
        first = self.address("thresholds_attn_in", task.phase) + task.thresholds
        rows = first, first + task.second_thresholds
        threshold_rows = [row + task.next_plane * k if k else row for k in range(self.planes) for row in rows]
        gain = m.select(self.opening, self.address("attn_norm"), self.address("mlp_norm"))
        normed, zero = task.normed.equals(1), m.integer(0)
        scales = self.scale_rows(task)
        rounds = []
        for number in range(self.layout.rounds):
            first = (self.thread + number * self.threads) * CHANNELS_AT_ONCE
            offset = m.minimum(first, task.channels - CHANNELS_AT_ONCE)
            channel = task.first_channel + offset
            active = ((self.warp * WARP) + number * self.threads) * CHANNELS_AT_ONCE < task.channels

            def words(channel: Any = channel) -> list[Any]:
                thresholds = [word for r in threshold_rows for word in m.load_four(r + channel * 4)]
                own = [word for row in scales for word in m.load_two(row + channel * 2)]
                return thresholds + m.load_two(gain + m.select(normed, channel, zero) * 2) + own

            # On their way before anything is waited for.
            both, many = 2 * CHANNELS_AT_ONCE, 2 * CHANNELS_AT_ONCE * self.planes + 2 + 2 * len(scales)
            found = m.cond(active, "i" * many, words, lambda many=many: [zero] * many)
            thresholds = [found[both * k : both * (k + 1)] for k in range(self.planes)]
            gains, own = found[both * self.planes :][:2], found[both * self.planes + 2 :]
            pairs = [own[k : k + 2] for k in range(0, len(own), 2)]
            rounds.append(
                LaneChannels(
                    offset,
                    channel,
                    active,
                    first < task.channels,
                    thresholds[0],
                    gains,
                    pairs,
                    later_thresholds=thresholds[1:],
                )
            )
        scale = self.scale_of(task) if self.format.column_scales else None
        bias = self.bias_of(task) if self.shape.has_bias("gate", "up") else None
        kinds = "i" * (CHANNELS_AT_ONCE // 2 * len(rounds)) + "f"
        *values, square = m.cond(
            self.merging, kinds, lambda: self.recall(task, rounds), lambda: self.receive(task, rounds)
        )  # fmt: skip
        for number, round_ in enumerate(rounds):
            round_.values = values[CHANNELS_AT_ONCE // 2 * number : CHANNELS_AT_ONCE // 2 * (number + 1)]
        if scale is not None:
            m.write(self.smem("scales", self.thread), [scale])
        if bias is not None:
            m.write(self.smem("biases", self.thread), [m.as_bits(bias)])
        (norm,) = m.cond(
            normed, "f", lambda: self.norm_scale(square, rounds[0].active), lambda: [m.float32(0.0)]
        )  # fmt: skip
        return rounds, norm

    def scale_rows(self, task: Any) -> list[Any]:
        """Where the scales of rows begin that each list's channels have; those of lists that are not there, anywhere.

        The lists are gate's and up's of the first set, then of the second; or of any other layer the two sets'.
        """
        if not self.grouped:
            return []
        m = self.m
        first, up = self.address("scale_q", task.entry) + task.scales, self.address("scale_up") + task.scales
        rows = [first, m.select(self.gating, up, first + task.next_scales)]
        if self.lists > 2:
            rows += [first + task.next_scales, m.select(self.gating, up + task.next_scales, first)]
        return rows

    def norm_scale(self, square: Any, active: Any) -> list[Any]:
        """One over the root of the mean square of the stream, from its sums of squares."""
        m = self.m

        def one() -> list[Any]:
            words = [word for w in range(0, self.warps, 4) for word in m.read_four(self.smem("warps", w))]
            mean = self.sum([m.as_float(word) for word in words]) * (1.0 / self.shape.hidden)
            return [m.reciprocal_root(mean + self.shape.eps)]

        (total,) = m.cond(
            self.warp * WARP < self.layout.squares, "f", lambda: [self.warp_sum(square)], lambda: [m.float32(0.0)]
        )
        m.write(self.smem("warps", self.warp), [m.as_bits(total)], self.lane.equals(0))
        m.sync()
        return m.cond(active, "f", one, lambda: [m.float32(0.0)])

    def scale_of(self, task: Any) -> Any:
        """The bits of the scale of a lane's column, of which `Products.total` has the sum."""
        m = self.m
        second, column = self.column(task)
        scale = self.address("scale_q", m.select(second & self.gating, m.integer(ENTERED.index("up")), task.entry))
        return m.load(scale + (task.first_column + column) * 4)

    def bias_of(self, task: Any) -> Any:
        """The bias of gate or up of a lane's column, which `Results.gate` adds; zero in other phases."""
        m = self.m
        second, column = self.column(task)
        at, has = self.bias_of_either(second ^ True, "gate", "up")
        has = self.gating & has
        bias = m.load_bfloat16(at + m.select(has, task.first_column + column, m.integer(0)) * 2)
        return m.select(has, bias, m.float32(0.0))

    def recall(self, task: Any, rounds: list[LaneChannels]) -> list[Any]:
        """The attention's outputs, merged over its splits, as pairs of bfloat16."""
        m, out = self.m, []
        self.merge(task)
        merged = self.cuts["attn_out"].channels
        for round_ in rounds:
            words = m.read_four(self.smem("merged", m.minimum(round_.offset, merged - CHANNELS_AT_ONCE)))
            out += [(words[k] >> 16) | (words[k + 1] & -65536) for k in range(0, CHANNELS_AT_ONCE, 2)]
        return [*out, m.float32(0.0)]

    def receive(self, task: Any, rounds: list[LaneChannels]) -> list[Any]:
        """What other CTAs send of a lane's channels, and one lane's of the sums of the stream's squares."""
        m, squares = self.m, self.layout.squares
        at, lane_has = self.at["exchange"], task.normed.equals(1) & (self.thread < squares)
        pairs = [(at + (task.source + round_.channel // 2) * MAILBOX, round_.valid) for round_ in rounds]
        single = at + (task.squares + m.minimum(self.thread, squares - 1)) * MAILBOX
        *words, square = m.poll(pairs, [(single, lane_has)], self.flag - task.behind)
        return [*words, m.as_float(square)]
