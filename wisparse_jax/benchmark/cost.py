"""What a decode step has to read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.weight import Weight
from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.forward import Params


def step_bytes(config: LlamaConfig, params: Params, kept: float, context: int, batch: int = 1) -> float:
    """Bytes of one step: the kept rows of the block linears with their scales, the whole head, keys and values.

    Args:
        config: of the model.
        params: its weights, or their shapes (`jax.eval_shape`).
        kept: the share of the rows, weighted by their lengths.
        context: tokens that attention reads.
        batch: sequences.
    """
    blocks = sum(Weight.of(block[name]).nbytes for block in params["blocks"] for name in LAYERS)
    head: Any = params.get("lm_head", params["embed"])
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(head))
    width = jnp.dtype(params["embed"].dtype).itemsize
    cache = 2 * batch * context * config.num_kv_heads * config.head_dim * width * config.num_blocks
    return blocks * kept + whole + cache
