"""One token through some decoder blocks, in one launch."""

from kernels_pallas.fused_block.api import LAYERS_OF as LAYERS_OF
from kernels_pallas.fused_block.api import FusedConfig as FusedConfig
from kernels_pallas.fused_block.api import FusedShape as FusedShape
from kernels_pallas.fused_block.api import block_shape as block_shape
from kernels_pallas.fused_block.api import first_exchange as first_exchange
from kernels_pallas.fused_block.api import fused_block_problem as fused_block_problem
from kernels_pallas.fused_block.api import fused_blocks as fused_blocks
