"""Rows of gate and up that are likely to be needed, asked for while attention keeps the memory idle."""

from __future__ import annotations

from kernels_pallas.fused_block.base import Base
from kernels_pallas.fused_block.layout import PHASES

MARGIN = 1.25  # of a threshold, above which a channel is expected to stay above it


class Foresight(Base):
    """Guesses what gate and up will keep from the stream before the output projection is added to it.

    A wrong guess costs reading a row into the L2 for nothing, and changes no result.
    """

    def ask_ahead(self) -> None:
        """Ask for the block's part of the rows of the first channels that will probably be kept, two a lane."""
        m, item = self.m, self.shape.item
        task = self.task(m.integer(PHASES.index("mlp_in")))
        channel = self.thread * 2

        def ask() -> None:
            (word, _) = m.load_two(self.post_of("stream", self.thread))
            gains = m.load(self.address("mlp_norm") + channel * 2)
            limits = self.address("limits_mlp_in") + channel * 4
            rows = [m.load_two(limits), m.load_two(limits + task.second_limits)]
            scale = m.as_float(m.read(self.place("norm"))) * (1 / MARGIN)
            values = [
                m.absolute(m.as_float(x) * scale * m.as_float(gain))
                for x, gain in ((word << 16, gains << 16), (word & -65536, gains & -65536))
            ]
            for layer, own in zip(("gate", "up"), rows, strict=True):
                start = self.address(f"kernel_{layer}") + (task.first_column * item)
                for k, (value, limit) in enumerate(zip(values, own, strict=True)):
                    m.ask(start + (channel + k) * task.stride, task.columns * item, value >= m.as_float(limit))

        m.when((self.thread < min(self.config.ahead, self.shape.hidden) // 2) & task.working.equals(1), ask)
