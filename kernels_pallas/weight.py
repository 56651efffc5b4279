"""A linear layer's weight as it is stored, in whatever format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels_pallas.formats import Format, format_of


class Weight(NamedTuple):
    """`[in, out]`; what `values` and `scales` are says the format, which is known by the values."""

    values: Any
    scales: Any = None

    @classmethod
    def of(cls, layer: Mapping[str, Any]) -> Weight:
        """A layer's, from its "kernel" and, where it has one, "scale"."""
        return cls(layer["kernel"], layer.get("scale"))

    @property
    def layer(self) -> dict[str, Any]:
        """The entries of a layer that `of` reads."""
        return {"kernel": self.values} | ({} if self.scales is None else {"scale": self.scales})

    @property
    def format(self) -> Format:
        """How it is stored.

        Raises:
            ValueError: values of no format.
        """
        return format_of(self.values)

    @property
    def kind(self) -> str:
        """The format's name."""
        return self.format.name

    @property
    def shape(self) -> tuple[int, int]:
        """Input channels and columns."""
        return self.format.shape(self.values)

    @property
    def nbytes(self) -> int:
        """Of the weight and its scales in memory."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tuple(self)))

    def wide(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "in_channels out"]:
        """The numbers that the weight stands for."""
        return self.format.wide(self.values, self.scales, dtype)

    def wide_planes(self, dtype: DTypeLike = jnp.float32) -> list[Float[Array, "in_channels out"]]:
        """What each plane adds to those above it; of a format without planes the whole weight."""
        return self.format.wide_planes(self.values, self.scales, dtype)


def as_weight(weight: Weight | Array) -> Weight:
    """An array is a weight without scales."""
    return weight if isinstance(weight, Weight) else Weight(weight)
