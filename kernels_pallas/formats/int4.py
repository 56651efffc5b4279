"""int4, one scale for 128 columns of an input channel's row.

No well-kept library's array type is used, as none has the bytes and the scales in the order in which the kernels read
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Shaped, UInt8

from kernels_pallas.formats.base import GROUP, Format, halves_of_rows
from kernels_pallas.lanes.machine import Machine

MIDDLE = 8  # what a number is stored with too much, so that it is not negative
# The scale of a group is one of these shares of largest / 7.5, of either sign: whichever rounds the group best.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
SCALE_BITS = 5  # significant ones: times four bits of a weight, of which 8 needs one and 7 three, that is a bfloat16
# A number n in bits 2 to 5 of the float16 256 makes it 256 + n, in bits 6 to 9 of 16 makes it 16 + n.
EVEN, ODD = 0x003C003C, 0x03C003C0
EVEN_ONE, ODD_ONE = 0x5C005C00, 0x4C004C00


class Int4(Format):
    """Values uint8 `[in, out / 2]`, scales bfloat16 `[out / 128, in]`, rounded up.

    A byte holds column 2c in its lower half and 2c + 1 in its upper one, W = (half - 8) * scale. Scales have five
    significant bits, so every weight is a bfloat16.

    For the lanes eight columns a word, each 8 too much; the scales are in the values that rows are multiplied with. Two
    rows' numbers of a column become two float16 by one shift and one operation of three operands. The less too much
    they are, the less is lost in the sums: 264 and 24 times a value, where 1032 would be simplest.
    """

    name, bits, packed = "int4", 4, 2
    group, by_text = GROUP, True
    multiplied, surplus = "f16", (256.0 + MIDDLE, 16.0 + MIDDLE)

    def holds(self, values: Any) -> bool:
        """Whether these are values of the format."""
        return not isinstance(values, tuple) and values.dtype == jnp.uint8

    def problem(self, size_out: int) -> str | None:
        """Bytes hold two columns each."""
        return f"expected an even number of columns, found {size_out}" if size_out % 2 else None

    def quantise(
        self, kernel: Float[Array, "in_channels out"]
    ) -> tuple[UInt8[Array, "in_channels _"], BFloat16[Array, "groups in_channels"]]:
        """`clip(round(W / scale), -8, 7)` for 128 columns of an input channel's row at a time.

        The scale is the one among a few with the least squared error of its group. With a negative one the largest
        weight may be the one that -8 stands for.
        """
        return self.pack(*self.nearest(kernel.astype(jnp.float32)))

    def nearest(self, rows: Float[Array, "*rows out"]) -> tuple[Float[Array, "*rows out"], Float[Array, "*rows _"]]:
        """Whole numbers from -8 to 7, and the scale of every 128 of them; to be called inside a jit."""
        size_out = rows.shape[-1]
        groups = -(-size_out // GROUP)
        # Padded with zeros, which every scale rounds to zeros.
        wide = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, groups * GROUP - size_out)])
        wide = wide.reshape(*rows.shape[:-1], groups, GROUP)
        largest = jnp.maximum(jnp.abs(wide).max(axis=-1), jnp.finfo(jnp.float32).tiny * 2.0**20)

        def rounded(scale: Array) -> Array:
            return jnp.clip(jnp.round(wide / scale[..., None]), -MIDDLE, MIDDLE - 1)

        best = least = None
        for share in SHARES:
            for sign in (1.0, -1.0):
                scale = _significant(sign * share / 7.5 * largest)
                error = jnp.square(rounded(scale) * scale[..., None] - wide).sum(axis=-1)
                if best is None or least is None:
                    best, least = scale, error
                else:
                    best, least = jnp.where(error < least, scale, best), jnp.minimum(error, least)
        assert best is not None
        return rounded(best).reshape(*rows.shape[:-1], -1)[..., :size_out], best

    def pack(
        self, numbers: Float[Array, "in_channels out"], scales: Float[Array, "in_channels groups"]
    ) -> tuple[UInt8[Array, "in_channels _"], BFloat16[Array, "groups in_channels"]]:
        """The values and scales of `nearest`'s numbers and scales."""
        halves = (numbers + MIDDLE).astype(jnp.uint8)
        return halves[:, ::2] | (halves[:, 1::2] << 4), scales.T.astype(jnp.bfloat16)

    def wide(
        self, values: UInt8[Array, "in_channels _"], scales: BFloat16[Array, "groups in_channels"], dtype: DTypeLike
    ) -> Float[Array, "in_channels out"]:
        """The numbers that the weight stands for."""
        size_in, size_out = self.shape(values)
        halves = jnp.stack([values & 15, values >> 4], axis=-1).reshape(size_in, size_out)
        repeated = jnp.repeat(scales.T, GROUP, axis=1)[:, :size_out]
        return (halves.astype(jnp.int8) - jnp.int8(MIDDLE)).astype(dtype) * repeated.astype(dtype)

    def unpack(self, stored: Shaped[Array, "*shape"]) -> list[Shaped[Array, "*shape"]]:
        """The numbers of the even columns and of the odd ones."""
        wide = stored.astype(jnp.int32)
        return [(half & 15) - MIDDLE for half in (wide, wide >> 4)]

    def constants(self, m: Machine[Any]) -> list[Any]:
        """256 and 16, twice each; an instruction takes one number of its own, and that is the mask."""
        return [m.opaque(m.integer(one)) for one in (EVEN_ONE, ODD_ONE)]

    def pairs(self, m: Machine[Any], rows: list[list[Any]], constants: list[Any]) -> Iterator[tuple[int, list[Any]]]:
        """A half word has four columns: two of them come into their places by a shift up, two by one down."""
        kinds = list(zip((EVEN, ODD), constants, strict=True))
        for half, selector in enumerate((0x5410, 0x7632)):
            words = [halves_of_rows(m, rows, w, selector) for w in range(4)]
            for upper in range(2):
                for w in range(4):
                    here = [pair >> 6 if upper else pair << 2 for pair in words[w]]
                    yield 4 * w + 2 * half + upper, [m.and_or(p, mask, one) for p in here for mask, one in kinds]

    def number(self, m: Machine[Any], word: Any, first: Any) -> Any:
        """As the lowest bits of the float32 2^23."""
        return m.as_float(((word >> first) & 0xF) | 0x4B000000) - (2.0**23 + MIDDLE)


def _significant(scale: Array) -> Array:
    """Rounded to `SCALE_BITS` significant bits."""
    mantissa, exponent = jnp.frexp(scale)
    return jnp.ldexp(jnp.round(mantissa * 2**SCALE_BITS) / 2**SCALE_BITS, exponent)
