"""Weights as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.formats.base import Format, halves_of_rows, precision_of
from kernels_pallas.lanes.machine import Machine


class Float(Format):
    """Values `[in, out]` of a float dtype, no scales."""

    def __init__(self, name: str):
        self.name, self.bits = name, 8 * jnp.dtype(name).itemsize

    def holds(self, values: Any) -> bool:
        """Whether these are values of the format."""
        return not isinstance(values, tuple) and values.dtype == jnp.dtype(self.name)

    def wide(self, values: Any, scales: Any, dtype: DTypeLike) -> Any:
        """The numbers that the weight stands for."""
        return values.astype(dtype)

    def dot(self, x: Any, values: Any, scales: Any) -> Any:
        """`x @ weight`, of two dtypes as they promote."""
        return jnp.matmul(x, values, precision=precision_of(x))


class Bfloat16(Float):
    """bfloat16; for the lanes two columns a word."""

    multiplied = "bf16"

    def constants(self, m: Machine[Any]) -> list[Any]:
        """No constants: float weights are multiplied as they are."""
        return []

    def pairs(self, m: Machine[Any], rows: list[list[Any]], constants: list[Any]) -> Iterator[tuple[int, list[Any]]]:
        """The lower halves of a word are one column, the upper ones the next."""
        for w in range(4):
            low, high = (halves_of_rows(m, rows, w, selector) for selector in (0x5410, 0x7632))
            yield w, [low[0], high[0], low[1], high[1]]
