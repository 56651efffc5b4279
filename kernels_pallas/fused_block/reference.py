"""The same from the other operations' references, in plain XLA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Array

from kernels_pallas.decode_attention.api import HeadNorms, decode_attention
from kernels_pallas.select.api import select_attention, select_gated, select_norm
from kernels_pallas.select.reference import add_parts
from kernels_pallas.sparse_product.api import sparse_product
from kernels_pallas.weight import Weight


def fused_blocks_reference(
    x: Array,
    blocks: Sequence[Mapping[str, Any]],
    cache: Any,
    limits: Sequence[Mapping[str, Array]],
    angles: tuple[Array, Array],
    slot: Array,
    start: Array,
    windows: Sequence[int | None],
    eps: float,
) -> tuple[Array, list[tuple[Array, Array]], list[dict[str, Array]]]:
    """See `fused_blocks`."""
    how: dict[str, Any] = {"implementation": "xla"}
    new, counts = [], []
    for block, own, thresholds, window in zip(blocks, cache, limits, windows, strict=True):
        counts.append({})

        def rows(group: str, thresholds: Any = thresholds) -> int:
            return 1 << (thresholds[group].shape[1] - 1).bit_length()

        def multiply(group: str, kept: Any, names: str | list[str], block: Any = block) -> tuple[Array, ...]:
            counts[-1][group] = kept.counts
            return sparse_product(kept, [Weight.of(block[name]) for name in names], **how)

        def bias(name: str, block: Any = block) -> Array | None:
            return block[name].get("bias")

        x, kept = select_norm(x, None, None, block["attn_norm"], eps, thresholds["attn_in"], rows("attn_in"), **how)
        inputs = multiply("attn_in", kept, ["q", "k", "v"])
        norms = HeadNorms(block["q_norm"], block["k_norm"]) if "q_norm" in block else None
        partial, highest, total, keys, values = decode_attention(
            (inputs[0], inputs[1], inputs[2]), (bias("q"), bias("k"), bias("v")), norms, angles[0], angles[1], own[0],
            own[1], slot, start, window, eps, **how,
        )  # fmt: skip
        new.append((keys, values))
        kept = select_attention(partial, highest, total, thresholds["attn_out"], rows("attn_out"), x.dtype, **how)
        (parts,) = multiply("attn_out", kept, ["o"])
        x, kept = select_norm(
            x, parts, bias("o"), block["mlp_norm"], eps, thresholds["mlp_in"], rows("mlp_in"), **how
        )  # fmt: skip
        gate, up = multiply("mlp_in", kept, ["gate", "up"])
        kept = select_gated(
            gate, up, bias("gate"), bias("up"), thresholds["mlp_mid"], rows("mlp_mid"), x.dtype, **how
        )  # fmt: skip
        (parts,) = multiply("mlp_mid", kept, ["down"])
        x = add_parts(x, parts, bias("down"))
    return x, new, counts
