"""The entry point of the operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.fused_block.config import config_for, problem
from kernels_pallas.fused_block.launch import exchange_shape, launch_mosaic, launch_simulated
from kernels_pallas.fused_block.layout import COUNTED, ENTERED, FusedConfig, FusedShape, entries, products
from kernels_pallas.fused_block.reference import fused_blocks_reference
from kernels_pallas.implementation import choose, processors
from kernels_pallas.weight import Weight

Block = Mapping[str, Any]
Cache = Sequence[tuple[Float[Array, "1 slots kv_heads head_dim"], Float[Array, "1 slots kv_heads head_dim"]]]
Counts = list[dict[str, Int[Array, "_ _"]]]
LAYERS_OF = {"attn_in": ["q", "k", "v"], "attn_out": ["o"], "mlp_in": ["gate", "up"], "mlp_mid": ["down"]}
UNSEEN = 2**30  # a window that holds every slot


def block_shape(block: Block, head_dim: int, eps: float) -> FusedShape:
    """What a kernel for such a decoder block is compiled for.

    Args:
        block: "kernel" of each layer by name, and "bias", "scale" where it has them (`Weight`); and the norms.
        head_dim: features of a head.
        eps: of the norms.
    """
    columns = {name: Weight.of(block[name]).shape[1] for name in ("q", "k", "o", "gate")}
    return FusedShape(
        hidden=columns["o"],
        intermediate=columns["gate"],
        heads=columns["q"] // head_dim,
        kv_heads=columns["k"] // head_dim,
        head_dim=head_dim,
        kind=Weight.of(block["o"]).kind,
        eps=eps,
        biases=tuple(n for n in ENTERED if "bias" in block[n]),
        qk_norm="q_norm" in block,
    )


def fused_block_problem(shape: FusedShape, batch: int, activations: Any) -> str | None:
    """Why the kernel cannot run such a block, if it cannot."""
    return problem(shape, config_for(shape, processors(), 1), batch, activations)


def first_exchange(shape: FusedShape, config: FusedConfig) -> Int[Array, "posts 2"]:
    """An exchange without posts, for any number of launches with tags of their own."""
    return jnp.zeros(exchange_shape(shape, config), jnp.int32)


def fused_blocks(
    x: Float[Array, "1 hidden"],
    blocks: Sequence[Block],
    cache: Cache,
    limits: Sequence[Mapping[str, Float[Array, "layers _"]]],
    angles: tuple[Float[Array, "1 half"], Float[Array, "1 half"]],
    slot: Int[Array, ""],
    start: Int[Array, " 1"],
    windows: Sequence[int | None],
    eps: float,
    exchange: Int[Array, "posts 2"] | None = None,
    tag: int | Int[Array, ""] = 2,
    config: FusedConfig | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "1 hidden"], Cache, Counts, Int[Array, "posts 2"] | None]:
    """One token of one sequence through some decoder blocks, in one launch.

    Before each product the channels below the layer's thresholds are left out, and their rows are not read.

    Args:
        x: the residual stream.
        blocks: of each decoder block "kernel", bf16, or int8 or int4 with a "scale" (`Weight`), and "bias" or not, of
            q, k, v, o, gate, up and down; "attn_norm" and "mlp_norm"; "q_norm" and "k_norm" or neither.
        cache: keys and values of each, of which slots start .. slot - 1 are read and `slot` is written.
        limits: thresholds of each by input group: "attn_in", "attn_out", "mlp_in", "mlp_mid".
        angles: cosines and sines of the token's rotary angles.
        slot: where the token stands.
        start: the first slot of the sequence.
        windows: tokens that a query of each sees, itself included, or None.
        eps: of the norms.
        exchange: from `first_exchange` or an earlier launch; changed.
        tag: of the first block, the next one's is one more; no launch since `first_exchange` had them, and the tag
            before the first is either new too or of the block that made `x`.
        config: how the work is shared; None asks `config_for`.
        implementation: "mosaic", "xla" or None.
        interpret: simulate the kernel in NumPy, on any device.

    Returns:
        The new residual stream; the new cache, in the memory of the old one where the caller donates it; how many
        channels each layer of each group kept in each part of them, for each block; and the exchange.

    Raises:
        ValueError: an implementation that cannot run here.
    """
    arguments = (x, blocks, cache, limits, angles, slot, start, windows, eps)
    if choose(implementation, interpret, ("mosaic", "xla")) == "xla":
        return *fused_blocks_reference(*arguments), exchange
    shape, depth = block_shape(blocks[0], cache[0][0].shape[3], eps), len(blocks)
    config = config or config_for(shape, processors(), cache[0][0].shape[1])
    if (reason := problem(shape, config, len(x), x.dtype)) is not None:
        raise ValueError(f"implementation = 'mosaic': {reason}")
    if not interpret and config.blocks > processors():
        raise ValueError(f"{config}: expected at most {processors()} blocks, the processors of the device")
    if depth > config.depth:
        raise ValueError(f"blocks: expected at most {config.depth}, as many as {config} has in a launch, found {depth}")
    expected = exchange_shape(shape, config)
    if exchange is None or exchange.shape != expected:
        found = None if exchange is None else exchange.shape
        raise ValueError(f"exchange: expected {expected} from first_exchange, found {found}")
    seen = [UNSEEN if window is None else window for window in windows]
    inputs = {
        "tag": jnp.asarray(tag, jnp.int32).reshape(1),
        "x": x,
        "cos": angles[0],
        "sin": angles[1],
        "slot": jnp.asarray(slot, jnp.int32).reshape(1),
        "start": start,
        "windows": jnp.asarray(seen, jnp.int32),
    }
    changed = {"exchange": exchange}
    for b, (block, own, thresholds) in enumerate(zip(blocks, cache, limits, strict=True)):
        changed |= {f"keys_{b}": own[0], f"values_{b}": own[1]}
        for name in entries(shape):
            kind, _, layer = name.partition("_")
            if kind == "limits":
                inputs[f"{name}_{b}"] = thresholds[layer]
            elif kind in ("kernel", "scale", "bias"):
                inputs[f"{name}_{b}"] = block[layer][kind]
            elif name in block:
                inputs[f"{name}_{b}"] = block[name]
    made, changed = (launch_simulated if interpret else launch_mosaic)(inputs, changed, shape, config, depth)
    counts = [
        {
            group: made["counts"][b, COUNTED[group] : COUNTED[group] + len(LAYERS_OF[group]), : product.splits]
            for group, product in products(shape, config).items()
        }
        for b in range(depth)
    ]
    new = [(changed[f"keys_{b}"], changed[f"values_{b}"]) for b in range(depth)]
    return made["new_x"], new, counts, changed["exchange"]
