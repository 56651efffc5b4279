"""One token through a decoder that is spread over a mesh, with the sparse kernels on every device."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from kernels_pallas.decode_step.separate import SUMMED
from wisparse_jax.models.config import INPUT_GROUPS, LlamaConfig
from wisparse_jax.models.decode import GroupThresholds, kernel_token_logits
from wisparse_jax.models.forward import Cache, Params
from wisparse_jax.models.mesh import DATA, MODEL, param_specs, part_of


def mesh_token_logits(
    config: LlamaConfig,
    params: Params,
    tokens: Int[Array, " batch"],
    slot: Int[Array, ""],
    start: Int[Array, " batch"],
    cache: Cache,
    thresholds: list[GroupThresholds],
    mesh: Mesh | AbstractMesh,
    implementation: str = "triton",
    interpret: bool = False,
    skipped: list[Array] | None = None,
    factors: Float[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """`kernel_token_logits` on a mesh: every device runs the kernels on its own heads, features and sequences.

    q, k, v, gate and up are split along their outputs, so that all devices of the model axis skip the same channels of
    the stream; o and down along their inputs, so that each skips its own channels, and their products are added up over
    the axis: two sums a block. `implementation` is "triton" or "xla"; `skipped` and `factors` are those of
    `kernel_token_logits`.

    Raises:
        ValueError: as `kernel_token_logits`; also "mosaic", whose launches span whole blocks.
    """
    if implementation == "mosaic":
        raise ValueError("implementation = 'mosaic' runs whole blocks in one launch, which a mesh cannot split")
    size = mesh.shape[MODEL]
    part = part_of(config, size)

    def step(
        params: Params, tokens: Array, start: Array, cache: Cache, thresholds: Any, slot: Array, factors: Array | None
    ) -> tuple[Array, Cache, list[Array]]:
        own: list[Array] | None = None if skipped is None else []
        logits, cache = kernel_token_logits(
            part,
            params,
            tokens,
            slot,
            start,
            cache,
            thresholds,
            implementation,
            interpret,
            axis=MODEL,
            skipped=own,
            factors=factors,
        )
        return logits, cache, own or []

    rows = DATA if len(tokens) % mesh.shape[DATA] == 0 else None
    whole, row, kept = PartitionSpec(), PartitionSpec(rows), PartitionSpec(rows, None, MODEL)
    split = {group: PartitionSpec(None, MODEL if group in SUMMED else None) for group in INPUT_GROUPS}
    vocab = MODEL if config.vocab_size % size == 0 else None
    logits, cache, shares = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(param_specs(config, params, size), row, row, kept, [split] * config.num_blocks, whole, row),
        out_specs=(PartitionSpec(rows, vocab), kept, row),
        check_vma=False,
    )(params, tokens, start, cache, thresholds, slot, factors)
    if skipped is not None:
        skipped += shares
    return logits, cache
