"""Weight formats: how a linear layer's weight is stored, a file each. Everything else asks the format."""

from __future__ import annotations

from typing import Any

import jax

from kernels_pallas.formats.base import Format as Format
from kernels_pallas.formats.floats import Bfloat16, Float
from kernels_pallas.formats.int4 import Int4
from kernels_pallas.formats.int8 import Int8
from kernels_pallas.formats.planes import Planes

# By name; those of integers in the order in which they are offered.
FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Float("float32"),
        Float("float16"),
        Bfloat16("bfloat16"),
        Int8(),
        Int4(),
        Planes(4, 2, 2),
        Planes(4, 4),
        Planes(2, 2, 2, 2),
    )
}


def format_of(values: Any) -> Format:
    """The format that a weight's values are in, arrays or their shapes.

    Raises:
        ValueError: in none.
    """
    for one in FORMATS.values():
        if one.holds(values):
            return one
    found = " and ".join(f"{one.dtype}{list(one.shape)}" for one in jax.tree.leaves(values))
    raise ValueError(f"weight: expected one of the formats {', '.join(FORMATS)}, found {found}")
