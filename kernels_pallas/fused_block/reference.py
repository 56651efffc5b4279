"""The same from the other operations' references, in plain XLA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float, Int

from kernels_pallas.select.api import select_attention, select_gated, select_norm
from kernels_pallas.sparse_product.api import sparse_product


def fused_block_reference(
    x: Float[Array, "1 hidden"],
    attention: tuple[Array, Array, Array],
    layers: Mapping[str, Mapping[str, Array]],
    norms: tuple[Array, Array | None],
    limits: Mapping[str, Array],
    eps: float,
) -> tuple[Array, tuple[Array, ...], dict[str, Int[Array, "_ _"]]]:
    """See `fused_block`."""
    how: dict[str, Any] = {"implementation": "xla"}
    counts = {}

    def multiply(group: str, kept: Any, names: str | list[str]) -> tuple[Array, ...]:
        counts[group] = kept.counts
        some = [layers[name] for name in names]
        return sparse_product(kept, [w["kernel"] for w in some], [w.get("scale") for w in some], **how)

    def rows(group: str) -> int:
        return 1 << (limits[group].shape[1] - 1).bit_length()

    kept = select_attention(*attention, limits["attn_out"], rows("attn_out"), x.dtype, **how)
    (parts,) = multiply("attn_out", kept, ["o"])
    x, kept = select_norm(
        x, parts, layers["o"].get("bias"), norms[0], eps, limits["mlp_in"], rows("mlp_in"), **how
    )  # fmt: skip
    gate, up = multiply("mlp_in", kept, ["gate", "up"])
    biases = layers["gate"].get("bias"), layers["up"].get("bias")
    kept = select_gated(gate, up, *biases, limits["mlp_mid"], rows("mlp_mid"), x.dtype, **how)
    (parts,) = multiply("mlp_mid", kept, ["down"])
    bias = layers["down"].get("bias")
    if norms[1] is None:
        y = parts.sum(0).astype(x.dtype)
        return x + (y if bias is None else y + bias), (), counts
    x, kept = select_norm(x, parts, bias, norms[1], eps, limits["attn_in"], rows("attn_in"), **how)
    return x, multiply("attn_in", kept, ["q", "k", "v"]), counts
