"""Nested bit planes: a weight that is stored once and read to as many bits as its input asks.

A weight is a code of 8 bits, cut into planes: plane 0 is its upper bits, the next plane the bits below them. Whoever
reads planes 0 to k has the code to so many bits, and takes the middle of the cell that is left. That sum has one term a
plane, so a plane is a weight of its own that is added to those above it, and none needs one value more than its bits
hold. One stored model serves every number of bits, as in any-precision LLM (Park et al. 2024, arXiv 2402.10517); how
many planes of an input channel are read follows its activation, as in GRINQH (2026, arXiv 2606.23419).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Shaped, UInt8

from kernels_pallas.formats.base import GROUP, Format, halves_of_rows
from kernels_pallas.lanes.machine import Machine


class Planes(Format):
    """Values a tuple of uint8 `[in, out * bits / 8]`, a plane each; scales bfloat16 `[out / 128, in]`, rounded up.

    Of a cut 4+2+2: s = max|w| / 8 of 128 columns of a row, code u = floor((w / s + 8) * 16), of which plane 0 has the
    upper 4 bits, f_0, plane 1 the next 2, f_1, plane 2 the last 2, f_2. Then

        w = s (f_0 - 7.5) + s / 4 (f_1 - 1.5) + s / 16 (f_2 - 1.5)

    to at most s / 32; without the last term to s / 8, and without the last two to s / 2. A byte of a plane holds
    8 / bits columns beside each other, the first in its lowest bits.
    """

    group = GROUP
    multiplied = "f16"

    def __init__(self, *cut: int):
        self.cut, self.bits, self.name = cut, sum(cut), f"int{'+'.join(map(str, cut))}"
        self.packed = 8 // min(cut)
        # The fused block walks rows of 4 bits, then those of later planes; its lists know no value of a plane alone.
        self.multiplied = "f16" if cut[0] == 4 else None

    @property
    def planes(self) -> tuple[int, ...]:
        """The bits of each plane."""
        return self.cut

    @property
    def alone(self) -> float:
        """What the first plane of a channel counts where it is the only one that is read.

        Cells of 2 bits are so wide that most of the weights in one lie on the near side of its middle.
        """
        return 0.9 if self.cut[0] == 2 else 1.0

    @property
    def steps(self) -> tuple[float, ...]:
        """What one unit of each plane's field is worth, in scales."""
        return tuple(2.0 ** (self.cut[0] - bits) for bits in accumulate(self.cut))

    @property
    def row_forms(self) -> tuple[Format, ...]:
        """The rows of each plane."""
        return tuple(PlaneRows(bits, step) for bits, step in zip(self.cut, self.steps, strict=True))

    def holds(self, values: Any) -> bool:
        """Whether these are values of the format."""
        if not isinstance(values, tuple) or len(values) != len(self.cut):
            return False
        columns = {one.shape[-1] * 8 / bits for one, bits in zip(values, self.cut, strict=True)}
        return len(columns) == 1 and all(one.dtype == jnp.uint8 for one in values)

    def shape(self, values: Any) -> tuple[int, int]:
        """Input channels and columns."""
        return values[0].shape[0], values[0].shape[1] * 8 // self.cut[0]

    def quantise(
        self, kernel: Float[Array, "in_channels out"]
    ) -> tuple[tuple[UInt8[Array, "in_channels _"], ...], BFloat16[Array, "groups in_channels"]]:
        """The planes of every weight's code, and a scale for 128 columns of an input channel's row at a time."""
        size_in, size_out = kernel.shape
        groups, half = -(-size_out // GROUP), 2 ** (self.cut[0] - 1)
        wide = jnp.pad(kernel.astype(jnp.float32), [(0, 0), (0, groups * GROUP - size_out)])
        wide = wide.reshape(size_in, groups, GROUP)
        # A row of zeros has any scale, one of which a step is a number still.
        largest = jnp.maximum(jnp.abs(wide).max(axis=-1), jnp.finfo(jnp.float32).tiny * 2.0**20)
        scales = _bfloat16_above(largest / half)
        codes = (wide / scales.astype(jnp.float32)[..., None] + half) / self.steps[-1]
        # The largest weight of all is the upper edge of the last cell.
        codes = jnp.clip(jnp.floor(codes), 0, 2**self.bits - 1).astype(jnp.uint8)
        codes = codes.reshape(size_in, groups * GROUP)[:, :size_out]
        below = [self.bits - bits for bits in accumulate(self.cut)]
        return tuple(_packed(codes >> n, bits) for n, bits in zip(below, self.cut, strict=True)), scales.T

    def wide(
        self,
        values: tuple[UInt8[Array, "in_channels _"], ...],
        scales: BFloat16[Array, "groups in_channels"],
        dtype: DTypeLike,
    ) -> Float[Array, "in_channels out"]:
        """The numbers that all planes stand for."""
        numbers = sum(n * step for n, step in zip(self.numbers(values), self.steps, strict=True))
        return (numbers * self._repeated(values, scales)).astype(dtype)

    def wide_planes(
        self,
        values: tuple[UInt8[Array, "in_channels _"], ...],
        scales: BFloat16[Array, "groups in_channels"],
        dtype: DTypeLike,
    ) -> list[Float[Array, "in_channels out"]]:
        """The term of each plane."""
        repeated = self._repeated(values, scales)
        return [(n * step * repeated).astype(dtype) for n, step in zip(self.numbers(values), self.steps, strict=True)]

    def numbers(self, values: tuple[UInt8[Array, "in_channels _"], ...]) -> list[Float[Array, "in_channels out"]]:
        """Each plane's fields around their middle, in steps: of 2 bits -1.5, -0.5, 0.5 and 1.5."""
        return [
            jnp.stack(form.unpack(one), axis=-1).reshape(self.shape(values))
            for one, form in zip(values, self.row_forms, strict=True)
        ]

    def _repeated(self, values: Any, scales: Array) -> Float[Array, "in_channels out"]:
        """The scale of every weight: each scale repeated over the columns that share it."""
        return jnp.repeat(scales.T.astype(jnp.float32), GROUP, axis=1)[:, : self.shape(values)[1]]


class PlaneRows(Format):
    """The rows of one plane: fields of some bits, which stand for as many numbers around zero.

    For the lanes 32 columns of a row of 4 or 2 bits. A field becomes the lowest bits of the float16 1024.
    """

    group = GROUP
    multiplied = "f16"

    def __init__(self, bits: int, step: float):
        self.name, self.bits, self.packed, self.step = f"plane of {bits} bits", bits, 8 // bits, step
        self.middle = (2**bits - 1) / 2
        self.surplus = (1024.0 + self.middle,) * 2

    def unpack(self, stored: Shaped[Array, "*shape"]) -> list[Float[Array, "*shape"]]:
        """The fields of each column of a byte, less their middle."""
        wide, bits = stored.astype(jnp.int32), self.bits
        fields = [(wide >> (k * bits)) & (2**bits - 1) for k in range(self.packed)]
        return [field.astype(jnp.float32) - self.middle for field in fields]

    def constants(self, m: Machine[Any]) -> list[Any]:
        """1024, twice; an instruction takes one number of its own, and that is the mask."""
        return [m.opaque(m.integer(0x64006400))]

    def pairs(self, m: Machine[Any], rows: list[list[Any]], constants: list[Any]) -> Iterator[tuple[int, list[Any]]]:
        """Each half of a word has 16 / bits columns, which a shift brings to the lowest bits of two rows' halves."""
        (one,), mask = constants, (2**self.bits - 1) * 0x00010001
        words, columns = self.bits, 16 // self.bits  # of a row; of half a word
        halves = {
            (w, h): halves_of_rows(m, rows, w, selector)
            for w in range(words)
            for h, selector in enumerate((0x5410, 0x7632))
        }
        for c in range(0, columns, 2):
            for (w, h), own in halves.items():
                here = [m.and_or(pair >> (self.bits * k) if k else pair, mask, one) for pair in own for k in (c, c + 1)]
                yield ((2 * w + h) * columns + c) // 2, here

    def number(self, m: Machine[Any], word: Any, first: Any) -> Any:
        """As the lowest bits of the float32 2^23."""
        return m.as_float(((word >> first) & (2**self.bits - 1)) | 0x4B000000) - 2.0**23 - self.middle


def _bfloat16_above(numbers: Float[Array, "*shape"]) -> BFloat16[Array, "*shape"]:
    """The least bfloat16 that is not below a positive number, so that nothing lies outside the outer cells."""
    bits = lax.bitcast_convert_type(numbers, jnp.uint32)
    above = (bits + jnp.uint32(0xFFFF)) & jnp.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(above, jnp.float32).astype(jnp.bfloat16)


def _packed(codes: UInt8[Array, "in_channels out"], bits: int) -> UInt8[Array, "in_channels _"]:
    """The lowest bits of each code, beside each other in bytes."""
    fields, per = codes & jnp.uint8(2**bits - 1), 8 // bits
    packed = fields[:, ::per]
    for k in range(1, per):
        packed = packed | (fields[:, k::per] << (k * bits))
    return packed
