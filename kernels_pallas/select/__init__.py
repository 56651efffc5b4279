"""Choosing the channels that layers keep, inside the small computations that make their input."""

from kernels_pallas.select.api import select as select
from kernels_pallas.select.api import select_attention as select_attention
from kernels_pallas.select.api import select_gated as select_gated
from kernels_pallas.select.api import select_norm as select_norm
