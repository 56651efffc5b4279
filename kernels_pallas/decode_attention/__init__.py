"""Attention of one new token a sequence over its cache."""

from kernels_pallas.decode_attention.api import HeadNorms as HeadNorms
from kernels_pallas.decode_attention.api import decode_attention as decode_attention
from kernels_pallas.decode_attention.api import splits_for as splits_for
