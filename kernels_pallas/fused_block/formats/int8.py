"""int8, four columns a word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kernels_pallas.lanes.machine import Machine


class Int8:
    """A byte, its sign turned over, becomes the lowest byte of the float16 1024: 1152 too much."""

    dtype = "f16"
    surplus: tuple[float, float] | None = (1152.0, 1152.0)

    def constants(self, m: Machine[Any]) -> list[Any]:
        """The upper bytes of two float16."""
        return [m.integer(0x64646464)]

    def pairs(self, m: Machine[Any], rows: list[list[Any]], constants: list[Any]) -> Iterator[tuple[int, list[Any]]]:
        """The bytes of two rows side by side, then each as the lowest byte of a float16."""
        (magic,) = constants
        for odd in range(2):
            for h, bytes_of in enumerate((0x5140, 0x7362)):
                for w in (odd, odd + 2):
                    positive = [row[w] ^ -0x7F7F7F80 for row in rows]
                    pairs = [m.permute(positive[k], positive[k + 1], bytes_of) for k in (0, 2)]
                    yield 2 * w + h, [m.permute(pair, magic, s) for pair in pairs for s in (0x4140, 0x4342)]

    def number(self, m: Machine[Any], word: Any, place: Any) -> Any:
        """As the lowest byte of the float32 2^23."""
        return m.as_float(((word >> place) & 0xFF ^ 0x80) | 0x4B000000) - (2.0**23 + 128)
