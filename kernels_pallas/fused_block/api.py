"""The entry point of the operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.fused_block.config import config_for, problem
from kernels_pallas.fused_block.launch import exchange_shape, launch_mosaic, launch_simulated
from kernels_pallas.fused_block.tiling import COUNTED, ENTERED, FusedConfig, FusedShape, block_arrays, products
from kernels_pallas.implementation import processors
from kernels_pallas.weight import Weight

Block = Mapping[str, Any]
Cache = Sequence[tuple[Float[Array, "1 slots kv_heads head_dim"], Float[Array, "1 slots kv_heads head_dim"]]]
Counts = list[dict[str, Int[Array, "_ _"]]]
LAYERS_OF = {"attn_in": ["q", "k", "v"], "attn_out": ["o"], "mlp_in": ["gate", "up"], "mlp_mid": ["down"]}
LAYER_NAMES = [name for names in LAYERS_OF.values() for name in names]
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


def first_exchange(shape: FusedShape, config: FusedConfig) -> Int[Array, "mailboxes 2"]:
    """An exchange with no flag in it, for any number of launches with flags of their own."""
    return jnp.zeros(exchange_shape(shape, config), jnp.int32)


def fused_blocks(
    x: Float[Array, "1 hidden"],
    blocks: Sequence[Block],
    cache: Cache,
    thresholds: Sequence[Mapping[str, Float[Array, "layers _"]]],
    angles: tuple[Float[Array, "1 half"], Float[Array, "1 half"]],
    slot: Int[Array, ""],
    start: Int[Array, " 1"],
    windows: Sequence[int | None],
    eps: float,
    exchange: Int[Array, "mailboxes 2"],
    flag: int | Int[Array, ""],
    config: FusedConfig,
    interpret: bool = False,
    factors: Float[Array, " 1"] | None = None,
) -> tuple[Float[Array, "1 hidden"], Cache, Counts, Int[Array, "mailboxes 2"]]:
    """One token of one sequence through some decoder blocks, in one launch: what `decode_step` runs as "mosaic".

    Args:
        x: the residual stream.
        blocks: of each decoder block "kernel", "scale" where the format has some (`Weight`), and "bias" or not, of
            q, k, v, o, gate, up and down; "attn_norm" and "mlp_norm"; "q_norm" and "k_norm" or neither.
        cache: keys and values of each, of which slots start .. slot - 1 are read and `slot` is written.
        thresholds: of each by input group: "attn_in", "attn_out", "mlp_in", "mlp_mid"; of a weight of planes as
            many rows for each layer.
        angles: cosines and sines of the token's rotary angles.
        slot: where the token stands.
        start: the first slot of the sequence.
        windows: tokens that a query of each sees, itself included, or None.
        eps: of the norms.
        exchange: from `first_exchange` or an earlier launch; changed.
        flag: of the first block; the next one's is one more; no launch since `first_exchange` had them, and the flag
            before the first is either new too or of the block that made `x`.
        config: how the work is shared.
        interpret: simulate the kernel in NumPy, on any device.
        factors: what all thresholds are multiplied with, in the kernel, or None.

    Returns:
        The new residual stream; the new cache, in the memory of the old one where the caller donates it; how many
        channels each layer of each group kept in each part of them, plane by plane, for each block; and the exchange.

    Raises:
        ValueError: blocks, a configuration or an exchange that cannot run.
    """
    shape, depth = block_shape(blocks[0], cache[0][0].shape[3], eps), len(blocks)
    if (reason := problem(shape, config, len(x), x.dtype)) is not None:
        raise ValueError(f"implementation = 'mosaic': {reason}")
    if not interpret and config.ctas > processors():
        raise ValueError(f"{config}: expected at most {processors()} CTAs, the multiprocessors of the device")
    if depth > config.depth:
        raise ValueError(f"blocks: expected at most {config.depth}, as many as {config} has in a launch, found {depth}")
    expected = exchange_shape(shape, config)
    if exchange.shape != expected:
        raise ValueError(f"exchange: expected {expected} from first_exchange, found {exchange.shape}")
    seen = [UNSEEN if window is None else window for window in windows]
    inputs = {
        "start_flag": jnp.asarray(flag, jnp.int32).reshape(1),
        "x": x,
        "cos": angles[0],
        "sin": angles[1],
        "slot": jnp.asarray(slot, jnp.int32).reshape(1),
        "start": start,
        "windows": jnp.asarray(seen, jnp.int32),
    }
    if factors is not None:
        inputs["factor"] = factors
    changed = {"exchange": exchange}
    for b, (block, own, levels) in enumerate(zip(blocks, cache, thresholds, strict=True)):
        changed |= {f"keys_{b}": own[0], f"values_{b}": own[1]}
        for name in block_arrays(shape):
            kind, _, layer = name.partition("_")
            if kind == "thresholds":
                inputs[f"{name}_{b}"] = levels[layer]
            elif kind in ("scale", "bias"):
                inputs[f"{name}_{b}"] = block[layer][kind]
            elif layer in LAYER_NAMES:
                plane = 0 if kind == "kernel" else int(kind.removeprefix("plane"))
                inputs[f"{name}_{b}"] = jax.tree.leaves(block[layer]["kernel"])[plane]
            elif name in block:
                inputs[f"{name}_{b}"] = block[name]
    made, changed = (launch_simulated if interpret else launch_mosaic)(inputs, changed, shape, config, depth)
    rows = shape.planes
    counts = [
        {
            group: made["counts"][b, rows * COUNTED[group] :][: rows * len(LAYERS_OF[group]), : product.splits]
            for group, product in products(shape, config).items()
        }
        for b in range(depth)
    ]
    new = [(changed[f"keys_{b}"], changed[f"values_{b}"]) for b in range(depth)]
    return made["new_x"], new, counts, changed["exchange"]
