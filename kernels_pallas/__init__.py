"""Operations of sparse decoding. They know arrays, not models; each folder holds one operation."""

from kernels_pallas.sparse_linear import sparse_linear as sparse_linear
