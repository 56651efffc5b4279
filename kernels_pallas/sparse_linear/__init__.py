"""Product of the kept input channels with a weight."""

from kernels_pallas.sparse_linear.api import sparse_linear as sparse_linear
