"""Product of listed channels with the weights of one or several layers."""

from kernels_pallas.sparse_product.api import sparse_product as sparse_product
from kernels_pallas.sparse_product.config import Config as Config
from kernels_pallas.sparse_product.config import config_for as config_for
