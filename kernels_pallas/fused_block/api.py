"""The entry point of the operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.fused_block.config import config_for, problem
from kernels_pallas.fused_block.launch import exchange_shape, launch_mosaic, launch_simulated
from kernels_pallas.fused_block.layout import COUNTED, FusedConfig, FusedShape, products
from kernels_pallas.fused_block.reference import fused_block_reference
from kernels_pallas.implementation import choose, processors

Layers = Mapping[str, Mapping[str, Array]]
NAMES = {"attn_out": ["o"], "mlp_in": ["gate", "up"], "mlp_mid": ["down"], "attn_in": ["q", "k", "v"]}
LIMITS = {"attn_out": "limits_out", "mlp_in": "limits_mlp", "mlp_mid": "limits_down", "attn_in": "limits_next"}


def block_shape(layers: Layers, heads: int, attention_splits: int, eps: float) -> FusedShape:
    """What a kernel for these layers is compiled for: o, gate, up, down, and q, k and v of the next block if any.

    Args:
        layers: "kernel" `[in, out]` of each layer by name, and "bias", "scale" where it has them.
        heads: of attention.
        attention_splits: of `decode_attention`.
        eps: of the norms.
    """
    next_ = [layers[n]["kernel"].shape[1] for n in "qkv"] if "q" in layers else []
    return FusedShape(
        hidden=layers["o"]["kernel"].shape[1],
        intermediate=layers["gate"]["kernel"].shape[1],
        attended=layers["o"]["kernel"].shape[0],
        heads=heads,
        attention_splits=attention_splits,
        sizes_next=tuple(next_),
        item=layers["o"]["kernel"].dtype.itemsize,
        eps=eps,
        biases=tuple(n for n in ("o", "gate", "up", "down") if "bias" in layers[n]),
    )


def fused_block_problem(shape: FusedShape, batch: int, weights: Any, activations: Any) -> str | None:
    """Why the kernel cannot run such a block, if it cannot."""
    return problem(shape, config_for(shape, processors()), batch, weights, activations)


def first_exchange(shape: FusedShape, config: FusedConfig | None = None) -> Int[Array, "posts 2"]:
    """An exchange without posts, for any number of launches with tags of their own."""
    return jnp.zeros(exchange_shape(shape, config or config_for(shape, processors())), jnp.int32)


def fused_block(
    x: Float[Array, "1 hidden"],
    attention: tuple[Float[Array, "1 splits features"], Float[Array, "1 splits heads"], Float[Array, "1 splits heads"]],
    layers: Layers,
    norms: tuple[Float[Array, " hidden"], Float[Array, " hidden"] | None],
    limits: Mapping[str, Float[Array, "layers _"]],
    eps: float,
    exchange: Int[Array, "posts 2"] | None = None,
    tag: int | Int[Array, ""] = 1,
    config: FusedConfig | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[
    Float[Array, "1 hidden"],
    tuple[Float[Array, "parts 1 _"], ...],
    dict[str, Int[Array, "_ _"]],
    Int[Array, "posts 2"] | None,
]:
    """From the attention of one block to the q, k and v of the next, for one sequence, in one launch.

    Merges attention's splits and multiplies with o; adds that to the stream, norms, multiplies with gate and up;
    multiplies silu(gate) * up with down; adds, norms, and multiplies with the next block's q, k and v. Before each
    product the channels below the layer's thresholds are left out, and their rows are not read.

    Args:
        x: the residual stream.
        attention: what `decode_attention` gives: outputs, highest scores and sums of weights by split.
        layers: "kernel" `[in, out]`, bf16 or int8 with a "scale", and "bias" or not, of o, gate, up and down, and of
            q, k and v of the next block, without which the kernel ends at the stream.
        norms: weights of the norm before gate and up, and of the next block's first, or None.
        limits: thresholds by input group: "attn_out", "mlp_in", "mlp_mid", and "attn_in" of the next block.
        eps: of the norms.
        exchange: from `first_exchange` or an earlier launch; changed.
        tag: a number other than 0 that no launch since `first_exchange` had.
        config: how the work is shared; None asks `config_for`.
        implementation: "mosaic", "xla" or None.
        interpret: simulate the kernel in NumPy, on any device.

    Returns:
        The new residual stream; partial sums of q, k and v in float32, or none; how many channels each layer of each
        group kept in each part of them; and the exchange.

    Raises:
        ValueError: an implementation that cannot run here.
    """
    if choose(implementation, interpret, ("mosaic", "xla")) == "xla":
        return *fused_block_reference(x, attention, layers, norms, limits, eps), exchange
    shape = block_shape(layers, attention[1].shape[2], attention[0].shape[1], eps)
    config = config or config_for(shape, processors())
    weights = layers["o"]["kernel"].dtype
    if (reason := problem(shape, config, len(x), weights, x.dtype)) is not None:
        raise ValueError(f"implementation = 'mosaic': {reason}")
    if not interpret and config.blocks > processors():
        raise ValueError(f"{config}: expected at most {processors()} blocks, the processors of the device")
    expected = exchange_shape(shape, config)
    if exchange is None or exchange.shape != expected:
        found = None if exchange is None else exchange.shape
        raise ValueError(f"exchange: expected {expected} from first_exchange, found {found}")
    inputs = {"tag": jnp.asarray(tag, jnp.int32).reshape(1), "x": x}
    inputs |= dict(zip(("partial", "highest", "total"), attention, strict=True))
    for group, names in NAMES.items():
        if group == "attn_in" and not shape.sizes_next:
            continue
        inputs[LIMITS[group]] = limits[group]
        for name in names:
            inputs[f"weight_{name}"] = layers[name]["kernel"]
            if "scale" in layers[name]:
                inputs[f"scale_{name}"] = layers[name]["scale"]
            if "bias" in layers[name] and group != "attn_in":
                inputs[f"bias_{name}"] = layers[name]["bias"]
    inputs["norm_mlp"] = norms[0]
    if norms[1] is not None:
        inputs["norm_next"] = norms[1]
    run = launch_simulated if interpret else launch_mosaic
    made, exchange = run(inputs, exchange, shape, config)
    kept = made["counts"]
    counts = {
        group: kept[COUNTED[group] : COUNTED[group] + len(NAMES[group]), : product.splits]
        for group, product in products(shape, config).items()
    }
    return made["new_x"], tuple(made[f"new_{n}"] for n in "qkv") if shape.sizes_next else (), counts, exchange
