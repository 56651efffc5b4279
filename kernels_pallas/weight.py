"""A linear layer's weight as it is stored: plain numbers, or small integers with scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

GROUP = 128  # columns of a row that share a scale in int4
MIDDLE = 8  # what an int4 number is stored with too much, so that it is not negative


class Weight(NamedTuple):
    """`[in, out]`, of one of these kinds:

    a float dtype's name  `values [in, out]`, no scales
    "int8"                `values` int8 `[in, out]`, `scales` float32 `[out]`: W = values * scales
    "int4"                `values` uint8 `[in, out / 2]`, `scales` bfloat16 `[out / 128, in]`, rounded up: a byte holds
                          column 2c in its lower half and 2c + 1 in its upper one, W = (half - 8) * scale, where 128
                          columns of a row have one scale. Scales have five significant bits, so every weight is a
                          bfloat16.
    """

    values: Array
    scales: Array | None = None

    @classmethod
    def of(cls, layer: Mapping[str, Any]) -> Weight:
        """A layer's, from its "kernel" and, where it has one, "scale"."""
        return cls(layer["kernel"], layer.get("scale"))

    @property
    def kind(self) -> str:
        """ "int4", "int8" or the dtype's name."""
        return kind_of(self.values.dtype)

    @property
    def bits(self) -> int:
        """Of one weight."""
        return bits_of(self.kind)

    @property
    def shape(self) -> tuple[int, int]:
        """Input channels and columns."""
        return self.values.shape[0], self.values.shape[1] * (2 if self.kind == "int4" else 1)

    @property
    def nbytes(self) -> int:
        """Of the weight and its scales in memory."""
        return sum(a.size * a.dtype.itemsize for a in self if a is not None)

    def wide(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "in_channels out"]:
        """The numbers that the weight stands for."""
        if self.scales is None:
            return self.values.astype(dtype)
        if self.kind == "int8":
            return (self.values.astype(jnp.float32) * self.scales[None]).astype(dtype)
        size_in, size_out = self.shape
        halves = jnp.stack([self.values & 15, self.values >> 4], axis=-1).reshape(size_in, size_out)
        scales = jnp.repeat(self.scales.T, GROUP, axis=1)[:, :size_out]
        return (halves.astype(jnp.int8) - jnp.int8(MIDDLE)).astype(dtype) * scales.astype(dtype)


def as_weight(weight: Weight | Array) -> Weight:
    """An array is a weight without scales."""
    return weight if isinstance(weight, Weight) else Weight(weight)


def kind_of(dtype: DTypeLike) -> str:
    """The kind of weights whose values have the dtype."""
    name = jnp.dtype(dtype).name
    return "int4" if name == "uint8" else name


def bits_of(kind: str) -> int:
    """Of one weight of a kind."""
    return 4 if kind == "int4" else 8 * jnp.dtype(kind).itemsize
