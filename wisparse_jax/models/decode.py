"""One token through the decoder with the sparse kernels: nine launches a block.

The arithmetic and the rounding are `forward.block`'s with thresholds; what differs is where the launches are cut.
Partial sums of a product are added by whichever kernel reads them next: norm, attention, or the gate.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.decode_attention import HeadNorms, decode_attention
from kernels_pallas.kept import Kept
from kernels_pallas.select import select_attention, select_gated, select_norm
from kernels_pallas.select.reference import add_parts
from kernels_pallas.sparse_product import Config, Ring, config_for, sparse_product
from wisparse_jax.models.config import INPUT_GROUPS, LlamaConfig
from wisparse_jax.models.forward import BlockCache, Cache, Params, Thresholds, head, layout, rms_norm

# One block's thresholds stacked by input group: group -> float32 [layers, in].
GroupThresholds = dict[str, Float[Array, "layers _"]]


def group_thresholds(thresholds: Thresholds) -> list[GroupThresholds]:
    """The thresholds of layers that read the same input, stacked, as the selection kernels take them."""
    return [{g: jnp.stack([b[n] for n in layers]) for g, layers in INPUT_GROUPS.items()} for b in thresholds]


def product_configs(config: LlamaConfig, params: Params, batch: int, mosaic: bool) -> dict[str, Config | Ring]:
    """How each group's product is cut into programs on this device, `mosaic` where tuning found that the faster one.

    The Mosaic kernel takes activations in bfloat16 only, whatever the weights are in.
    """
    dtype = params["blocks"][0]["q"]["kernel"].dtype
    mosaic = mosaic and params["embed"].dtype == jnp.bfloat16
    shapes = {g: [config.layer_shapes[n] for n in layers] for g, layers in INPUT_GROUPS.items()}
    return {g: config_for(s[0][0], tuple(out for _, out in s), batch, dtype, mosaic) for g, s in shapes.items()}


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
    records: list[dict[str, Kept]] | None = None,
    configs: dict[str, Config | Ring] | None = None,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """The logits after one more token a row, and the cache with it, by the kernels.

    `implementation` is "triton", or "mosaic" for the Mosaic product where tuning found it faster. `records`, if given,
    receives each block's lists of kept channels by input group; `configs` replaces the products' own configurations.

    Raises:
        ValueError: the kernels cannot run on this device.
    """
    where = layout(config, len(tokens), 1, slot, start)
    cos, sin = where.cos[:, 0], where.sin[:, 0]
    if configs is None:
        configs = product_configs(config, params, len(tokens), implementation == "mosaic")
    how: dict[str, Any] = {"implementation": "triton", "interpret": interpret}

    x, parts, bias = params["embed"][tokens], None, None
    new = []
    for i, (block, limits) in enumerate(zip(params["blocks"], thresholds, strict=True)):
        record: dict[str, Kept] = {}
        multiply = functools.partial(_multiply, block, configs, how, record)
        biases = {name: block[name].get("bias") for layers in INPUT_GROUPS.values() for name in layers}
        norms = HeadNorms(block["q_norm"], block["k_norm"]) if config.qk_norm else None
        rows = {group: configs[group].rows for group in configs}
        with jax.named_scope(f"block_{i}"):
            x, kept = select_norm(
                x, parts, bias, block["attn_norm"], config.norm_eps, limits["attn_in"], rows["attn_in"], **how
            )
            query, key, value = multiply("attn_in", kept)
            partial, highest, total, keys, values = decode_attention(
                (query, key, value),
                (biases["q"], biases["k"], biases["v"]),
                norms,
                cos,
                sin,
                *cache[i],
                slot,
                start,
                config.windows[i],
                config.norm_eps,
                **how,
            )
            new.append(BlockCache(keys, values))
            kept = select_attention(partial, highest, total, limits["attn_out"], rows["attn_out"], x.dtype, **how)
            (parts,) = multiply("attn_out", kept)
            x, kept = select_norm(
                x, parts, biases["o"], block["mlp_norm"], config.norm_eps, limits["mlp_in"], rows["mlp_in"], **how
            )
            gate, up = multiply("mlp_in", kept)
            kept = select_gated(
                gate, up, biases["gate"], biases["up"], limits["mlp_mid"], rows["mlp_mid"], x.dtype, **how
            )
            (parts,), bias = multiply("mlp_mid", kept), biases["down"]
        if records is not None:
            records.append(record)
    x = add_parts(x, parts, bias)
    return head(params, rms_norm(x, params["norm"], config.norm_eps)), new


def _multiply(
    block: Params,
    configs: dict[str, Config | Ring],
    how: dict[str, Any],
    record: dict[str, Kept],
    group: str,
    kept: Kept,
) -> tuple[Array, ...]:
    record[group] = kept
    layers = [block[name] for name in INPUT_GROUPS[group]]
    if isinstance(configs[group], Ring):
        how = {"implementation": "mosaic"}
    return sparse_product(
        kept, [layer["kernel"] for layer in layers], [layer.get("scale") for layer in layers], configs[group], **how
    )
