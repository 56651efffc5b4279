"""What the kernel asks of a kind of weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from kernels_pallas.lanes.machine import Machine


class Format(Protocol):
    """A kind of weights."""

    dtype: str  # that the tensor cores multiply
    # What is multiplied in place of an integer is so much more than it, in even and in odd columns; None for floats.
    surplus: tuple[float, float] | None

    def constants(self, m: Machine[Any]) -> list[Any]:
        """What `pairs` needs in registers, made before the loop that calls it."""
        ...

    def pairs(self, m: Machine[Any], rows: list[list[Any]], constants: list[Any]) -> Iterator[tuple[int, list[Any]]]:
        """Four rows of 16 bytes as the tensor cores' left operand, for columns 2i and 2i + 1 of the vector by i.

        Not in the order of i, but so that those with the same i // 4, which are added up together, are far apart.
        """
        ...

    def number(self, m: Machine[Any], word: Any, place: Any) -> Any:
        """The float of the integer that begins at a bit of a word of a row."""
        ...


def halves_of_rows(m: Machine[Any], rows: list[list[Any]], word: int, selector: int) -> list[Any]:
    """Two bytes of a row's word below those of the next row's: of the first two rows and of the last two."""
    return [m.permute(rows[k][word], rows[k + 1][word], selector) for k in (0, 2)]
