"""int4, eight columns a word, each 8 too much; the scales are in the values that rows are multiplied with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kernels_pallas.fused_block.formats.base import halves_of_rows
from kernels_pallas.lanes.machine import Machine
from kernels_pallas.weight import MIDDLE

# A number n in bits 2 to 5 of the float16 256 makes it 256 + n, in bits 6 to 9 of 16 makes it 16 + n.
EVEN, ODD = 0x003C003C, 0x03C003C0
EVEN_ONE, ODD_ONE = 0x5C005C00, 0x4C004C00


class Int4:
    """Two rows' numbers of a column become two float16 by one shift and one operation of three operands.

    The less too much they are, the less is lost in the sums: 264 and 24 times a value, where 1032 would be simplest.
    """

    dtype = "f16"
    surplus: tuple[float, float] | None = (256.0 + MIDDLE, 16.0 + MIDDLE)

    def constants(self, m: Machine[Any]) -> list[Any]:
        """256 and 16, twice each; an instruction takes one number of its own, and that is the mask."""
        return [m.again(m.integer(one)) for one in (EVEN_ONE, ODD_ONE)]

    def pairs(self, m: Machine[Any], rows: list[list[Any]], constants: list[Any]) -> Iterator[tuple[int, list[Any]]]:
        """A half word has four columns: two of them come into their places by a shift up, two by one down."""
        kinds = list(zip((EVEN, ODD), constants, strict=True))
        for half, selector in enumerate((0x5410, 0x7632)):
            words = [halves_of_rows(m, rows, w, selector) for w in range(4)]
            for upper in range(2):
                for w in range(4):
                    here = [pair >> 6 if upper else pair << 2 for pair in words[w]]
                    yield 4 * w + 2 * half + upper, [m.masked(p, mask, one) for p in here for mask, one in kinds]

    def number(self, m: Machine[Any], word: Any, place: Any) -> Any:
        """As the lowest bits of the float32 2^23."""
        return m.as_float(((word >> place) & 0xF) | 0x4B000000) - (2.0**23 + MIDDLE)
