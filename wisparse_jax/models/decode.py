"""One token through the decoder with the sparse kernels.

The arithmetic and the rounding are `forward.block`'s with thresholds; what differs is where the launches are cut.
"triton" has nine launches a block, and a product's partial sums are added by whichever kernel reads them next: norm,
attention, or the gate. "mosaic" has one launch for several blocks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.decode_attention import HeadNorms, decode_attention
from kernels_pallas.fused_block import (
    FusedConfig,
    FusedShape,
    block_shape,
    first_exchange,
    fused_block_problem,
    fused_blocks,
)
from kernels_pallas.fused_block.config import config_for as fused_config_for
from kernels_pallas.implementation import processors
from kernels_pallas.kept import Kept
from kernels_pallas.select import select_attention, select_gated, select_norm
from kernels_pallas.select.reference import add_parts
from kernels_pallas.sparse_product import Config, config_for, sparse_product
from kernels_pallas.weight import Weight
from wisparse_jax.models.config import INPUT_GROUPS, LlamaConfig
from wisparse_jax.models.forward import BlockCache, Cache, Params, head, layout, rms_norm
from wisparse_jax.models.rules import Thresholds

# One block's thresholds stacked by input group: group -> float32 [layers, in].
GroupThresholds = dict[str, Float[Array, "layers _"]]
# Groups whose input channels are split over the devices of a mesh's model axis.
SUMMED = ("attn_out", "mlp_mid")
# How many channels each layer of a group kept in any sequence, in each part of them: group -> int32 [layers, parts].
Record = dict[str, Int[Array, "_ _"]]


def group_thresholds(thresholds: Thresholds) -> list[GroupThresholds]:
    """The thresholds of layers that read the same input, stacked, as the selection kernels take them."""
    return [{g: jnp.stack([b[n] for n in layers]) for g, layers in INPUT_GROUPS.items()} for b in thresholds]


def zero_thresholds(config: LlamaConfig) -> list[GroupThresholds]:
    """Thresholds that keep every channel: with them the kernels' step is the dense model's; all blocks share them."""
    shared = {g: jnp.zeros((len(ns), config.layer_shapes[ns[0]][0]), jnp.float32) for g, ns in INPUT_GROUPS.items()}
    return [shared] * config.num_blocks


def product_configs(config: LlamaConfig, params: Params, batch: int) -> dict[str, Config]:
    """How the Triton kernel cuts each group's product into programs on this device."""
    kind = Weight.of(params["blocks"][0]["q"]).kind
    shapes = {g: [config.layer_shapes[n] for n in layers] for g, layers in INPUT_GROUPS.items()}
    return {g: config_for(s[0][0], tuple(out for _, out in s), batch, kind) for g, s in shapes.items()}


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
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """The logits after one more token a row, and the cache with it, by the kernels.

    `implementation` is "triton", "mosaic", or "xla" for the references of Triton's kernels. `records`, if given,
    receives how many channels each layer of each block kept; `configs` and `fused_config` replace the kernels' own
    configurations. `axis` is the mesh axis over which the model is split, where this runs as one device's part of it
    (`mesh_token_logits`): then `config` and all arrays are those of the part, and so are the logits.

    Raises:
        ValueError: the kernels cannot run on this device, or not this model.
    """
    where = layout(config, len(tokens), 1, slot, start)
    configs = product_configs(config, params, len(tokens)) if configs is None else configs
    separate = "xla" if implementation == "xla" else "triton"
    how: dict[str, Any] = {"implementation": separate, "interpret": interpret}
    step = _Step(config, configs, how, where.cos[:, 0], where.sin[:, 0], slot, start, axis)
    kept_counts: list[Record] = [{} for _ in params["blocks"]] if records is None else records
    kept_counts.extend({} for _ in range(config.num_blocks - len(kept_counts)))
    arguments = params, _embedded(config, params, tokens, axis), cache, thresholds, kept_counts
    x, new = step.fused(*arguments, fused_config) if implementation == "mosaic" else step.separate(*arguments)
    return head(params, rms_norm(x, params["norm"], config.norm_eps)), new


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


class _Step:
    """What all blocks of one step share."""

    def __init__(
        self,
        config: LlamaConfig,
        configs: dict[str, Config],
        how: dict[str, Any],
        cos: Array,
        sin: Array,
        slot: Array,
        start: Array,
        axis: str | None,
    ):
        self.config, self.configs, self.how = config, configs, how
        self.angles, self.slot, self.start, self.axis = (cos, sin), slot, start, axis

    def separate(
        self, params: Params, x: Array, cache: Cache, thresholds: list[GroupThresholds], records: list[Record]
    ) -> tuple[Array, Cache]:
        """Selections and products as launches of their own."""
        parts, bias, new = None, None, []
        for i, (block, limits) in enumerate(zip(params["blocks"], thresholds, strict=True)):
            with jax.named_scope(f"block_{i}"):
                x, inputs = self.inputs(block, x, parts, bias, limits, records[i])
                attention, block_cache = self.attention(i, block, inputs, cache)
                new.append(block_cache)
                kept = select_attention(*attention, limits["attn_out"], self.rows("attn_out"), x.dtype, **self.how)
                (parts,) = self.multiply(block, "attn_out", kept, records[i])
                x, kept = select_norm(
                    x, parts, block["o"].get("bias"), block["mlp_norm"], self.config.norm_eps, limits["mlp_in"],
                    self.rows("mlp_in"), **self.how,
                )  # fmt: skip
                gate, up = self.multiply(block, "mlp_in", kept, records[i])
                kept = select_gated(
                    gate, up, block["gate"].get("bias"), block["up"].get("bias"), limits["mlp_mid"],
                    self.rows("mlp_mid"), x.dtype, **self.how,
                )  # fmt: skip
                (parts,), bias = self.multiply(block, "mlp_mid", kept, records[i]), block["down"].get("bias")
        return add_parts(x, parts, bias), new

    def fused(
        self,
        params: Params,
        x: Array,
        cache: Cache,
        thresholds: list[GroupThresholds],
        records: list[Record],
        fused_config: FusedConfig | None,
    ) -> tuple[Array, Cache]:
        """Several blocks a launch."""
        blocks, new = params["blocks"], []
        shape = fused_shape(self.config, params)
        run = fused_config or fused_config_for(shape, processors(), cache[0].keys.shape[1])
        # Zeroed in every step, so that tags need only be told apart within it.
        exchange = first_exchange(shape, run)
        for first in range(0, len(blocks), run.depth):
            some = slice(first, first + run.depth)
            with jax.named_scope(f"blocks_{first}"):
                x, own, counts, exchange = fused_blocks(
                    x, blocks[some], cache[some], thresholds[some], self.angles, self.slot, self.start,
                    self.config.windows[some], self.config.norm_eps, exchange, first + 2, run, "mosaic",
                    self.how["interpret"],
                )  # fmt: skip
            new += [BlockCache(*pair) for pair in own]
            for record, kept in zip(records[some], counts, strict=True):
                record.update(kept)
        return x, new

    def inputs(
        self, block: Params, x: Array, parts: Array | None, bias: Array | None, limits: GroupThresholds, record: Record
    ) -> tuple[Array, tuple[Array, ...]]:
        """The stream with a product added, and partial sums of q, k and v."""
        x, kept = select_norm(
            x,
            parts,
            bias,
            block["attn_norm"],
            self.config.norm_eps,
            limits["attn_in"],
            self.rows("attn_in"),
            **self.how,
        )
        return x, self.multiply(block, "attn_in", kept, record)

    def attention(
        self, i: int, block: Params, inputs: tuple[Array, ...], cache: Cache
    ) -> tuple[tuple[Array, Array, Array], BlockCache]:
        """The splits of attention, and the block's cache with the new token."""
        norms = HeadNorms(block["q_norm"], block["k_norm"]) if self.config.qk_norm else None
        partial, highest, total, keys, values = decode_attention(
            (inputs[0], inputs[1], inputs[2]),
            (block["q"].get("bias"), block["k"].get("bias"), block["v"].get("bias")),
            norms,
            *self.angles,
            *cache[i],
            self.slot,
            self.start,
            self.config.windows[i],
            self.config.norm_eps,
            **self.how,
        )
        return (partial, highest, total), BlockCache(keys, values)

    def rows(self, group: str) -> int:
        return self.configs[group].rows

    def multiply(self, block: Params, group: str, kept: Kept, record: Record) -> tuple[Array, ...]:
        record[group] = kept.counts
        weights = [Weight.of(block[name]) for name in INPUT_GROUPS[group]]
        parts = sparse_product(kept, weights, self.configs[group], **self.how)
        if self.axis is None or group not in SUMMED:
            return parts
        # Every device has multiplied its own input channels.
        return tuple(lax.psum(part.sum(0, keepdims=True), self.axis) for part in parts)
