"""What everything else asks of a weight format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from kernels_pallas.lanes.machine import Machine

GROUP = 128  # columns of a row that share a scale, in formats with such scales


class Format:
    """A way to store a weight `[in, out]`: its `values`, and its `scales` where it has some.

    A format is known again by its values alone, so no two may have values of the same kind.
    """

    name: str
    bits: int  # of a weight as it is stored, scales not counted
    packed: int = 1  # columns that one stored number holds: number c has columns `packed * c` and those behind it
    step: float = 1.0  # what one unit of an unpacked number is worth, in scales
    column_scales: bool = False  # whether every column has a scale, float32 `[out]`
    group: int | None = None  # columns of a row that share a scale, bfloat16 `[groups, in]`
    for_heads: bool = False  # whether a model's head is offered in it
    by_text: bool = False  # whether rounding can make up for its errors on a text: it has `nearest` and `pack` then

    # The fused block: what its tensor cores multiply, "bf16" or "f16"; None if it cannot run the format.
    multiplied: str | None = None
    # What is multiplied in place of an integer is so much more than it, in even and in odd columns; None for floats.
    surplus: tuple[float, float] | None = None

    @property
    def scaled(self) -> bool:
        """Whether the values are integers, of which scales make weights."""
        return self.column_scales or self.group is not None

    @property
    def planes(self) -> tuple[int, ...]:
        """The bits of each plane, of which a product may read the first few alone; most formats have one."""
        return (self.bits,)

    @property
    def alone(self) -> float:
        """What the first plane of a channel counts where it is the only one that is read."""
        return 1.0

    @property
    def plane_bits(self) -> tuple[float, ...]:
        """What a weight takes of its row, plane by plane; the row's scales are read with the first."""
        first, *others = map(float, self.planes)
        return first + (0.0 if self.group is None else 16 / self.group), *others

    def holds(self, values: Any) -> bool:
        """Whether these are values of the format."""
        raise NotImplementedError

    def problem(self, size_out: int) -> str | None:
        """Why a weight of so many columns cannot be stored, if it cannot."""
        found = f"expected columns in multiples of {self.packed}, found {size_out}"
        return found if size_out % self.packed else None

    def quantise(self, kernel: Float[Array, "in_channels out"]) -> tuple[Any, Array]:
        """The values and the scales of a weight; to be called inside a jit."""
        raise NotImplementedError

    def shape(self, values: Any) -> tuple[int, int]:
        """Input channels and columns."""
        return values.shape[0], values.shape[1] * self.packed

    def wide(self, values: Any, scales: Any, dtype: DTypeLike) -> Float[Array, "in_channels out"]:
        """The numbers that the weight stands for."""
        raise NotImplementedError

    def wide_planes(self, values: Any, scales: Any, dtype: DTypeLike) -> list[Float[Array, "in_channels out"]]:
        """What each plane adds to those above it; all together are the weight."""
        return [self.wide(values, scales, dtype)]

    def dot(self, x: Float[Array, "*batch in_channels"], values: Any, scales: Any) -> Float[Array, "*batch out"]:
        """`x @ weight` in x's dtype, float32 as float32 on every device (no TF32, no bf16 passes)."""
        return jnp.matmul(x, self.wide(values, scales, x.dtype), precision=precision_of(x))

    def nearest(self, rows: Float[Array, "*rows out"]) -> tuple[Float[Array, "*rows out"], Float[Array, "*rows _"]]:
        """Whole numbers, and the scale of every group of them; to be called inside a jit."""
        raise NotImplementedError

    def pack(
        self, numbers: Float[Array, "in_channels out"], scales: Float[Array, "in_channels _"]
    ) -> tuple[Any, Array]:
        """The values and scales of `nearest`'s numbers and scales."""
        raise NotImplementedError

    @property
    def row_forms(self) -> tuple[Format, ...]:
        """What the rows of each plane are, one by one: formats with `packed`, `unpack` and `step`."""
        return (self,)

    def unpack(self, stored: Shaped[Array, "*shape"]) -> list[Shaped[Array, "*shape"]]:
        """The numbers of each of the columns that the stored numbers hold; in a kernel too."""
        return [stored]

    def constants(self, m: Machine[Any]) -> list[Any]:
        """What `pairs` needs in registers, made before the loop that calls it."""
        raise NotImplementedError

    def pairs(self, m: Machine[Any], rows: list[list[Any]], constants: list[Any]) -> Iterator[tuple[int, list[Any]]]:
        """Four rows of 16 bytes as the tensor cores' left operand, for columns 2i and 2i + 1 of the vector by i.

        Not in the order of i, but so that those with the same i // 4, which are added up together, are far apart.
        """
        raise NotImplementedError

    def number(self, m: Machine[Any], word: Any, first: Any) -> Any:
        """The float of the integer that begins at a bit of a word of a row.

        Never asked for of floats: what is no finite number comes out of the tensor cores as it should.
        """
        raise NotImplementedError


def precision_of(x: Array) -> lax.Precision:
    """Of a product with x."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT


def scaled(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """x times a factor, rounded once to x's dtype."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def halves_of_rows(m: Machine[Any], rows: list[list[Any]], word: int, selector: int) -> list[Any]:
    """Two bytes of a row's word below those of the next row's: of the first two rows and of the last two."""
    return [m.permute_bytes(rows[k][word], rows[k + 1][word], selector) for k in (0, 2)]
