"""The channels that layers keep of one input: what a selection writes and a product reads."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int

LARGEST_BATCH = 16  # sequences that the kernels take, the rows of a tensor core's product


class Nested(NamedTuple):
    """Of weights in planes, which have a list each: how many, and what a value of the first counts without the next."""

    planes: int = 1
    alone: float = 1.0


WHOLE = Nested()  # weights that are read whole


class Kept(NamedTuple):
    """Lists of kept channels, one per layer and chunk of `rows` channels.

    Entry j of list (l, s) is kept for j < counts[l, s]. With several sequences a list holds the channels that any of
    them keeps, and the value of a channel that a sequence itself skips is 0.
    """

    counts: Int[Array, "layers chunks"]
    channels: Int[Array, "layers chunks rows"]  # index into the whole input
    values: Float[Array, "layers chunks batch rows"]

    @property
    def chunks(self) -> int:
        """How many chunks the input is cut into."""
        return self.channels.shape[1]

    @property
    def rows(self) -> int:
        """Channels in a chunk, a power of two."""
        return self.channels.shape[2]


def power_of_two(size: int) -> int:
    """The least power of two that is not below the size."""
    return 1 << max(0, size - 1).bit_length()
