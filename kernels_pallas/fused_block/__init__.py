"""Everything of the decoder between the attention of one block and that of the next, in one launch."""

from kernels_pallas.fused_block.api import FusedConfig as FusedConfig
from kernels_pallas.fused_block.api import FusedShape as FusedShape
from kernels_pallas.fused_block.api import block_shape as block_shape
from kernels_pallas.fused_block.api import first_exchange as first_exchange
from kernels_pallas.fused_block.api import fused_block as fused_block
from kernels_pallas.fused_block.api import fused_block_problem as fused_block_problem
