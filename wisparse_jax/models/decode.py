"""One token through the decoder with the sparse kernels.

The arithmetic and the rounding are `forward.block`'s with thresholds; the blocks are `kernels_pallas.decode_step`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.decode_step import decode_step
from kernels_pallas.fused_block import FusedConfig, FusedShape, block_shape, fused_block_problem
from kernels_pallas.kept import Kept
from kernels_pallas.sparse_product import Config
from wisparse_jax.models.config import INPUT_GROUPS, LlamaConfig
from wisparse_jax.models.formats import block_format
from wisparse_jax.models.forward import BlockCache, Cache, Params, head, layout, rms_norm
from wisparse_jax.models.rules import Thresholds

# One block's thresholds stacked by input group: group -> float32 [layers, in], of planes [layers * planes, in].
GroupThresholds = dict[str, Float[Array, "rows _"]]
# How many channels each layer of a group kept in any sequence, in each part of them: group -> int32 [layers, parts].
Record = dict[str, Int[Array, "_ _"]]


def group_thresholds(thresholds: Thresholds, planes: int = 1) -> list[GroupThresholds]:
    """The thresholds of layers that read the same input, stacked, as the selection kernels take them.

    A layer of several planes has one row for each of them: its own, or the layer's again for each.
    """

    def rows(thresholds: Float[Array, "..."]) -> Float[Array, "planes _"]:
        return thresholds if thresholds.ndim == 2 else jnp.broadcast_to(thresholds, (planes, len(thresholds)))

    return [{g: jnp.concatenate([rows(b[n]) for n in ns]) for g, ns in INPUT_GROUPS.items()} for b in thresholds]


def zero_thresholds(config: LlamaConfig, planes: int = 1) -> list[GroupThresholds]:
    """Thresholds that keep every channel: with them the kernels' step is the dense model's; all blocks share them."""
    sizes = {g: (planes * len(ns), config.layer_shapes[ns[0]][0]) for g, ns in INPUT_GROUPS.items()}
    shared = {g: jnp.zeros(size, jnp.float32) for g, size in sizes.items()}
    return [shared] * config.num_blocks


def fused_step_problem(config: LlamaConfig, params: Params, batch: int) -> str | None:
    """Why the "mosaic" step cannot run a model, if it cannot."""
    return fused_block_problem(fused_shape(config, params), batch, params["embed"].dtype)


def fused_shape(config: LlamaConfig, params: Params) -> FusedShape:
    """What the fused blocks are compiled for."""
    return block_shape(params["blocks"][0], config.head_dim, config.norm_eps)


def kernel_token_logits(
    config: LlamaConfig,
    params: Params,
    tokens: Int[Array, " batch"],
    slot: Int[Array, ""],
    start: Int[Array, " batch"],
    cache: Cache,
    thresholds: list[GroupThresholds],
    implementation: str = "triton",
    interpret: bool = False,
    records: list[Record] | None = None,
    configs: dict[str, Config] | None = None,
    fused_config: FusedConfig | None = None,
    axis: str | None = None,
    skipped: list[Array] | None = None,
    factors: Float[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """The logits after one more token a row, and the cache with it, by the kernels.

    `implementation` is "triton", "mosaic", or "xla" for the references of Triton's kernels. `records`, if given,
    receives how many channels each layer of each block kept; `configs` and `fused_config` replace the kernels' own
    configurations. `axis` is the mesh axis over which the model is split, where this runs as one device's part of it
    (`mesh_token_logits`): then `config` and all arrays are those of the part, and so are the logits. `skipped`, if
    given, receives the share of channels that each sequence skipped, weighted by parameter count. `factors`, if given,
    are what each sequence's thresholds are multiplied with, where the kernels compare with them.

    Raises:
        ValueError: the kernels cannot run on this device, or not this model.
    """
    where = layout(config, len(tokens), 1, slot, start)
    angles = where.cos[:, 0], where.sin[:, 0]
    step = decode_step(
        _embedded(config, params, tokens, axis), params["blocks"], cache, thresholds, angles, slot, start,
        config.windows, config.norm_eps, implementation, interpret, factors, configs, fused_config, axis,
    )  # fmt: skip
    if records is not None:
        records[:] = step.counts
    if skipped is not None:
        several = len(tokens) > 1
        counts = [{g: _own_counts(kept) for g, kept in own.items()} for own in step.kept] if several else step.counts
        share = _skipped(config, counts, block_format(params).plane_bits)
        skipped.append(share if axis is None else lax.pmean(share, axis))
    cache = [BlockCache(*pair) for pair in step.cache]
    return head(params, rms_norm(step.x, params["norm"], config.norm_eps)), cache


def _own_counts(kept: Kept) -> Int[Array, "layers chunks batch"]:
    """How many channels each of several sequences keeps itself; a value of 0, which adds nothing, counts as skipped."""
    listed = jnp.arange(kept.rows)[None, None] < kept.counts[:, :, None]
    return jnp.sum(listed[:, :, None] & (kept.values != 0), axis=-1, dtype=jnp.int32)


def _skipped(
    config: LlamaConfig, counts: Sequence[Mapping[str, Int[Array, "rows parts ..."]]], plane_bits: Sequence[float]
) -> Array:
    """One less the share of kept weights, or of their bits, [batch], from counts of kept channels by block and group.

    One sum over all counts, since each of them is tiny.
    """
    parts, weights = [], []
    for block in counts:
        for group, names in INPUT_GROUPS.items():
            parts.append(block[group].reshape(-1, *block[group].shape[2:]))
            own = [config.layer_shapes[name][1] * bits for name in names for bits in plane_bits]
            weights += [one for one in own for _ in range(block[group].shape[1])]
    share = np.asarray(weights, np.float32) / (config.num_blocks * sum(config.layer_weights) * sum(plane_bits))
    flat = jnp.concatenate(parts).astype(jnp.float32)
    return 1.0 - jnp.sum(flat.reshape(len(share), -1) * share[:, None], axis=0)


def _embedded(
    config: LlamaConfig, params: Params, tokens: Int[Array, " batch"], axis: str | None
) -> Float[Array, "batch hidden"]:
    """The tokens' rows of the embedding, also where every device has only some rows."""
    rows = params["embed"]
    if axis is None or len(rows) == config.vocab_size:
        return rows[tokens]
    own = tokens - lax.axis_index(axis) * len(rows)
    here = (own >= 0) & (own < len(rows))
    return lax.psum(jnp.where(here[:, None], rows[jnp.clip(own, 0, len(rows) - 1)], 0), axis)
