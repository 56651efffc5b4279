"""The dense baseline of the decode benchmark: the fastest dense step that we can make in the same program."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.decode_attention import HeadNorms, decode_attention
from kernels_pallas.select.reference import merge_reference, rms_norm
from kernels_pallas.sparse_linear.reference import dot
from wisparse_jax.models.config import INPUT_GROUPS, LlamaConfig
from wisparse_jax.models.forward import BlockCache, Cache, Params, attention_of, head, layout


def fused(params: Params) -> list[Params]:
    """The dense baseline's own weights: q, k, v in one matrix, gate and up in another, as its products are fastest."""
    join = jax.jit(lambda *weights: jnp.concatenate(weights, axis=-1))
    made = []
    for block in params["blocks"]:
        groups = {g: [block[n] for n in names] for g, names in INPUT_GROUPS.items()}
        made.append({g: join(*(layer["kernel"] for layer in layers)) for g, layers in groups.items()})
        if "bias" in block["q"]:
            made[-1]["bias"] = join(*(layer["bias"] for layer in groups["attn_in"]))
    return made


def dense_logits(
    config: LlamaConfig,
    kernels: bool,
    params: Params,
    joined: list[Params],
    tokens: jax.Array,
    slot: jax.Array,
    start: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """A dense step on fused weights, its products XLA's; attention XLA's too, or the sparse step's own kernel."""
    where = layout(config, len(tokens), 1, slot, start)
    x, new = params["embed"][tokens], []
    sizes = np.cumsum([config.layer_shapes[n][1] for n in ("q", "k")])
    for i, (block, weights) in enumerate(zip(params["blocks"], joined, strict=True)):
        qkv = dot(rms_norm(x, block["attn_norm"], config.norm_eps), weights["attn_in"])
        qkv = jnp.split(qkv + weights["bias"][None] if "bias" in weights else qkv, sizes, axis=-1)
        if kernels:
            norms = HeadNorms(block["q_norm"], block["k_norm"]) if config.qk_norm else None
            parts: Any = tuple(part.astype(jnp.float32)[None] for part in qkv)
            partial, highest, total, keys, values = decode_attention(
                parts, (None, None, None), norms, where.cos[:, 0], where.sin[:, 0], *cache[i], slot, start,
                config.windows[i], config.norm_eps,
            )  # fmt: skip
            attended = merge_reference(partial, highest, total, x.dtype)
        else:
            heads = [part.reshape(len(x), 1, -1, config.head_dim) for part in qkv]
            attended, (keys, values) = attention_of(config, config.windows[i], block, where, cache[i], *heads)
            attended = attended[:, 0]
        new.append(BlockCache(keys, values))
        x = x + dot(attended, weights["attn_out"])
        gate, up = jnp.split(dot(rms_norm(x, block["mlp_norm"], config.norm_eps), weights["mlp_in"]), 2, axis=-1)
        x = x + dot(jax.nn.silu(gate) * up, weights["mlp_mid"])
    return head(params, rms_norm(x, params["norm"], config.norm_eps)), new
