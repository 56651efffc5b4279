"""int8, one scale a column."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32
from jaxtyping import Int8 as Int8Array

from kernels_pallas.formats.base import Format, precision_of
from kernels_pallas.lanes.machine import Machine

LARGEST = 127


class Int8(Format):
    """Values int8 `[in, out]`, scales float32 `[out]`: W = values * scales.

    For the lanes four columns a word. A byte, its sign turned over, becomes the lowest byte of the float16 1024: 1152
    too much.
    """

    name, bits = "int8", 8
    column_scales, for_heads = True, True
    multiplied, surplus = "f16", (1152.0, 1152.0)

    def holds(self, values: Any) -> bool:
        """Whether these are values of the format."""
        return not isinstance(values, tuple) and values.dtype == jnp.int8

    def quantise(
        self, kernel: Float[Array, "in_channels out"]
    ) -> tuple[Int8Array[Array, "in_channels out"], Float32[Array, " out"]]:
        """`round(W / scale)` and `scale = max_i |W_ij| / 127`, so that no weight is off by more than half a scale."""
        wide = kernel.astype(jnp.float32)
        # A column of zeros has any scale.
        scale = jnp.maximum(jnp.abs(wide).max(axis=0), jnp.finfo(jnp.float32).tiny * LARGEST) / LARGEST
        return jnp.round(wide / scale[None]).astype(jnp.int8), scale

    def wide(
        self, values: Int8Array[Array, "in_channels out"], scales: Float32[Array, " out"], dtype: DTypeLike
    ) -> Float[Array, "in_channels out"]:
        """The numbers that the weight stands for."""
        return (values.astype(jnp.float32) * scales[None]).astype(dtype)

    def dot(
        self,
        x: Float[Array, "*batch in_channels"],
        values: Int8Array[Array, "in_channels out"],
        scales: Float32[Array, " out"],
    ) -> Float[Array, "*batch out"]:
        """`x @ weight` in x's dtype; the columns' scales come after the product."""
        precision = precision_of(x)
        whole = jnp.matmul(x, values.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
        return (whole * lax.broadcast_to_rank(scales, whole.ndim)).astype(x.dtype)

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
                    pairs = [m.permute_bytes(positive[k], positive[k + 1], bytes_of) for k in (0, 2)]
                    yield 2 * w + h, [m.permute_bytes(pair, magic, s) for pair in pairs for s in (0x4140, 0x4342)]

    def number(self, m: Machine[Any], word: Any, first: Any) -> Any:
        """As the lowest byte of the float32 2^23."""
        return m.as_float(((word >> first) & 0xFF ^ 0x80) | 0x4B000000) - (2.0**23 + 128)
