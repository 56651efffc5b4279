"""What a timed sparse step skips, counted by the step itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.sparse_linear.reference import keep_mask
from wisparse_jax.benchmark.random_model import CALIBRATION_STEPS
from wisparse_jax.models.config import INPUT_GROUPS, LAYERS, LlamaConfig
from wisparse_jax.models.decode import Record, kernel_token_logits
from wisparse_jax.models.formats import block_format
from wisparse_jax.models.forward import Cache, Params, head, hidden_states, layout
from wisparse_jax.models.rules import rules_of


def realised(
    config: LlamaConfig, kind: str, params: Params, cache: Cache, context: int, batch: int, grouped: Any
) -> np.ndarray:
    """Share of channels that no sequence kept, per block and layer, replaying the timed run's first tokens.

    Of planes the share of bits.
    """
    step = counting_step(config, kind, batch)
    tokens, state, counts = jnp.arange(5, 5 + batch, dtype=jnp.int32), cache, []
    for i in range(CALIBRATION_STEPS):
        tokens, state, kept = step(params, tokens, jnp.int32(context + i), state, grouped)
        counts.append(np.asarray(kept))
    read = np.mean(counts, axis=0)
    if read.shape[2] > 1:
        bits = np.array(block_format(params).plane_bits)
        read = read @ (bits / bits.sum())
    return 1 - read.reshape(read.shape[:2]) / np.array([config.layer_shapes[n][0] for n in LAYERS])


@functools.cache
def counting_step(config: LlamaConfig, kind: str, batch: int) -> Callable[..., Any]:
    """The sparse step that also returns how many channels each layer of each block kept: [blocks, 7, planes]."""
    start = jnp.zeros(batch, jnp.int32)

    @jax.jit
    def step(params: Params, tokens: jax.Array, slot: jax.Array, cache: Cache, thresholds: Any) -> Any:
        records: list[Record] = []
        logits, cache = kernel_token_logits(
            config, params, tokens, slot, start, cache, thresholds, kind, records=records
        )
        kept = [jnp.concatenate([r[g].sum(1) for g in INPUT_GROUPS]).reshape(len(LAYERS), -1) for r in records]
        return jnp.argmax(logits, -1).astype(jnp.int32), cache, jnp.stack(kept)

    @jax.jit
    def plain(params: Params, tokens: jax.Array, slot: jax.Array, cache: Cache, thresholds: Any) -> Any:
        records: list[dict[str, Any]] = []
        where, rules = layout(config, batch, 1, slot, start), rules_of(thresholds)
        hidden, cache = hidden_states(config, params, tokens[:, None], where, cache, rules, records)
        kept = [
            jnp.stack([keep_mask(own[n][:, 0], levels[n]).any(axis=0).sum(-1).reshape(-1) for n in LAYERS])
            for own, levels in zip(records, thresholds, strict=True)
        ]
        return jnp.argmax(head(params, hidden[:, 0]), -1).astype(jnp.int32), cache, jnp.stack(kept)

    return plain if kind == "xla" else step
