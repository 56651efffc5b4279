"""One token through the blocks of a decoder."""

from kernels_pallas.decode_step.api import Step as Step
from kernels_pallas.decode_step.api import decode_step as decode_step
from kernels_pallas.decode_step.api import product_configs as product_configs
