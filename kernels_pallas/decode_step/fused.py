"""The step by the fused block, several decoder blocks a launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Array

from kernels_pallas.fused_block import FusedConfig, block_shape, first_exchange, fused_blocks
from kernels_pallas.fused_block.config import config_for
from kernels_pallas.implementation import processors


def fused_step(
    x: Array, blocks: Sequence[Mapping[str, Any]], cache: Any, thresholds: Any, angles: tuple[Array, Array],
    slot: Array, start: Array, windows: Sequence[int | None], eps: float, config: FusedConfig | None, interpret: bool,
    factors: Array | None,
) -> tuple[Array, list[tuple[Array, Array]], list[dict[str, Array]]]:  # fmt: skip
    """See `decode_step`: the stream, the caches, and the counts."""
    shape = block_shape(blocks[0], cache[0][0].shape[3], eps)
    config = config or config_for(shape, processors(), cache[0][0].shape[1])
    # Zeroed in every step, so that flags need only be told apart within it.
    exchange, new, counts = first_exchange(shape, config), [], []
    for first in range(0, len(blocks), config.depth):
        some = slice(first, first + config.depth)
        with jax.named_scope(f"blocks_{first}"):
            x, own, kept, exchange = fused_blocks(
                x, blocks[some], cache[some], thresholds[some], angles, slot, start, windows[some], eps, exchange,
                first + 2, config, interpret, factors,
            )  # fmt: skip
        new += own
        counts += kept
    return x, new, counts
