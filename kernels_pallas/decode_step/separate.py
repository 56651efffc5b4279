"""The step by the other operations, one after the other: nine launches a block by Triton, or their references.

A product's partial sums are added by whichever operation reads them next: the norm, attention, or the gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jaxtyping import Array

from kernels_pallas.decode_attention import HeadNorms, decode_attention
from kernels_pallas.fused_block import LAYERS_OF
from kernels_pallas.kept import Kept, Nested
from kernels_pallas.select import select_attention, select_gated, select_norm
from kernels_pallas.select.reference import add_parts
from kernels_pallas.sparse_product import Config, sparse_product
from kernels_pallas.weight import Weight

# Groups whose input channels are split over the devices of a mesh's model axis.
SUMMED = ("attn_out", "mlp_mid")


class SeparateStep:
    """What all blocks of one step share; see `decode_step`."""

    def __init__(self, configs: Mapping[str, Config], how: dict[str, Any], factors: Array | None, axis: str | None):
        self.configs, self.how, self.axis = configs, how, axis
        self.select: dict[str, Any] = how | {"factors": factors}  # how selections run
        self.kept: list[dict[str, Kept]] = []  # of each block, by group

    def run(
        self, x: Array, blocks: Sequence[Mapping[str, Any]], cache: Any, thresholds: Any, angles: tuple[Array, Array],
        slot: Array, start: Array, windows: Sequence[int | None], eps: float,
    ) -> tuple[Array, list[tuple[Array, Array]]]:  # fmt: skip
        """The residual stream after all blocks, and their caches."""
        parts, bias, new = None, None, []
        rows = {group: config.rows for group, config in self.configs.items()}
        for i, (block, own, levels, window) in enumerate(zip(blocks, cache, thresholds, windows, strict=True)):
            self.kept.append({})
            form = Weight.of(block["q"]).format
            select: dict[str, Any] = self.select | {"nested": Nested(len(form.planes), form.alone)}
            biases = {name: block[name].get("bias") for names in LAYERS_OF.values() for name in names}
            with jax.named_scope(f"block_{i}"):
                x, kept = select_norm(
                    x, parts, bias, block["attn_norm"], eps, levels["attn_in"], rows["attn_in"], **select
                )
                query, key, value = self.multiply(block, "attn_in", kept)
                norms = HeadNorms(block["q_norm"], block["k_norm"]) if "q_norm" in block else None
                partial, highest, total, keys, values = decode_attention(
                    (query, key, value), (biases["q"], biases["k"], biases["v"]), norms, angles[0], angles[1], own[0],
                    own[1], slot, start, window, eps, **self.how,
                )  # fmt: skip
                new.append((keys, values))
                kept = select_attention(
                    partial, highest, total, levels["attn_out"], rows["attn_out"], x.dtype, **select
                )
                (parts,) = self.multiply(block, "attn_out", kept)
                x, kept = select_norm(
                    x, parts, biases["o"], block["mlp_norm"], eps, levels["mlp_in"], rows["mlp_in"], **select
                )
                gate, up = self.multiply(block, "mlp_in", kept)
                kept = select_gated(
                    gate, up, biases["gate"], biases["up"], levels["mlp_mid"], rows["mlp_mid"], x.dtype,
                    **select,
                )  # fmt: skip
                (parts,), bias = self.multiply(block, "mlp_mid", kept), biases["down"]
        return add_parts(x, parts, bias), new

    def multiply(self, block: Mapping[str, Any], group: str, kept: Kept) -> tuple[Array, ...]:
        """Partial sums of each layer of a group."""
        self.kept[-1][group] = kept
        weights = [Weight.of(block[name]) for name in LAYERS_OF[group]]
        parts = sparse_product(kept, weights, self.configs[group], **self.how)
        if self.axis is None or group not in SUMMED:
            return parts
        # Every device has multiplied its own input channels.
        return tuple(lax.psum(part.sum(0, keepdims=True), self.axis) for part in parts)
