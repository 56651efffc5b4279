"""How weights of each kind become what the tensor cores multiply, a file each."""

from __future__ import annotations

from kernels_pallas.fused_block.formats.base import Format as Format
from kernels_pallas.fused_block.formats.bfloat16 import Bfloat16
from kernels_pallas.fused_block.formats.int4 import Int4
from kernels_pallas.fused_block.formats.int8 import Int8

FORMATS: dict[str, Format] = {"bfloat16": Bfloat16(), "int8": Int8(), "int4": Int4()}
