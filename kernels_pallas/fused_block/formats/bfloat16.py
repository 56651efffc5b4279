"""bfloat16, two columns a word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kernels_pallas.fused_block.formats.base import halves_of_rows
from kernels_pallas.lanes.machine import Machine


class Bfloat16:
    """The weights as they are."""

    dtype = "bf16"
    surplus: tuple[float, float] | None = None

    def constants(self, m: Machine[Any]) -> list[Any]:
        """None."""
        return []

    def pairs(self, m: Machine[Any], rows: list[list[Any]], constants: list[Any]) -> Iterator[tuple[int, list[Any]]]:
        """The lower halves of a word are one column, the upper ones the next."""
        for w in range(4):
            low, high = (halves_of_rows(m, rows, w, selector) for selector in (0x5410, 0x7632))
            yield w, [low[0], high[0], low[1], high[1]]

    def number(self, m: Machine[Any], word: Any, place: Any) -> Any:
        """Never asked for: what is no finite number comes out of the tensor cores as it should."""
        raise NotImplementedError
