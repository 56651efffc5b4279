"""What a decode step has to read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.weight import Weight
from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.forward import Params
from wisparse_jax.models.parameters import param_shapes
from wisparse_jax.models.quantise import quantise_params


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


def token_bytes(
    config: LlamaConfig, weights: str | None, head: str | None, sparsity: float, context: int = 512
) -> float:
    """Bytes that one token reads at a model's shapes, with what is not rounded in bfloat16.

    Args:
        config: of the model.
        weights: format of the block linears, None for bfloat16.
        head: likewise of the head.
        sparsity: share of the block weights that is skipped.
        context: tokens that attention reads.
    """
    shapes = jax.eval_shape(lambda params: quantise_params(params, weights, head), param_shapes(config, "bfloat16"))
    return step_bytes(config, shapes, 1 - sparsity, context)
