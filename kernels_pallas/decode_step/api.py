"""The entry point of the operation; its implementations stand beside it.

"xla" and "triton" run the other operations one after the other (`separate`), "mosaic" the fused block (`fused`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int

from kernels_pallas.decode_step.fused import fused_step
from kernels_pallas.decode_step.separate import SeparateStep
from kernels_pallas.fused_block import LAYERS_OF, FusedConfig
from kernels_pallas.implementation import choose
from kernels_pallas.kept import Kept
from kernels_pallas.sparse_product import Config, config_for
from kernels_pallas.weight import Weight

OFFERED = ("triton", "mosaic", "xla")
Slots = Float[Array, "batch slots kv_heads head_dim"]


class Step(NamedTuple):
    """What a step gives: the residual stream, the caches, and for each block what its layers kept, by input group."""

    x: Float[Array, "batch hidden"]
    cache: list[tuple[Slots, Slots]]
    counts: list[dict[str, Int[Array, "lists parts"]]]
    kept: list[dict[str, Kept]]  # the lists; empty for "mosaic", whose lists never leave the kernel


def product_configs(block: Mapping[str, Any], batch: int) -> dict[str, Config]:
    """How the Triton kernel cuts each group's product into programs on this device."""
    weights = {group: [Weight.of(block[name]) for name in names] for group, names in LAYERS_OF.items()}
    return {
        group: config_for(own[0].shape[0], tuple(weight.shape[1] for weight in own), batch, own[0].kind)
        for group, own in weights.items()
    }


def decode_step(
    x: Float[Array, "batch hidden"],
    blocks: Sequence[Mapping[str, Any]],
    cache: Sequence[tuple[Slots, Slots]],
    thresholds: Sequence[Mapping[str, Float[Array, "lists _"]]],
    angles: tuple[Float[Array, "batch half"], Float[Array, "batch half"]],
    slot: Int[Array, ""],
    start: Int[Array, " batch"],
    windows: Sequence[int | None],
    eps: float,
    implementation: str | None = None,
    interpret: bool = False,
    factors: Float[Array, " batch"] | None = None,
    configs: Mapping[str, Config] | None = None,
    fused_config: FusedConfig | None = None,
    axis: str | None = None,
) -> Step:
    """One token of each sequence through some decoder blocks, reading no row of a channel below its threshold.

    Args:
        x: the residual stream.
        blocks: of each decoder block "kernel", "scale" where the format has some (`Weight`), and "bias" or not, of
            q, k, v, o, gate, up and down; "attn_norm" and "mlp_norm"; "q_norm" and "k_norm" or neither.
        cache: keys and values of each, of which slots start .. slot - 1 are read and `slot` is written.
        thresholds: of each by input group: "attn_in", "attn_out", "mlp_in", "mlp_mid"; a list for each layer of
            the group, of a weight of planes as many for each layer.
        angles: cosines and sines of the tokens' rotary angles.
        slot: where the tokens stand.
        start: the first slot of each sequence.
        windows: tokens that a query of each block sees, itself included, or None.
        eps: of the norms.
        implementation: "triton", "mosaic", "xla" or None, which is "triton" on a GPU and "xla" elsewhere.
        interpret: interpret or simulate the kernels, on any device.
        factors: what each sequence's thresholds are multiplied with, where they are compared with, or None.
        configs: of the separate products; None asks `product_configs`.
        fused_config: of the fused block; None asks `config_for`.
        axis: the mesh axis that input channels of o and down are split over, where this is one device's part.

    Raises:
        ValueError: an implementation that cannot run here, or not such blocks.
    """
    chosen = choose(implementation, interpret, OFFERED)
    arguments = (x, blocks, cache, thresholds, angles, slot, start, windows, eps)
    if chosen == "mosaic":
        x, new, counts = fused_step(*arguments, fused_config, interpret, factors)
        return Step(x, new, counts, [])
    configs = product_configs(blocks[0], len(x)) if configs is None else configs
    step = SeparateStep(configs, {"implementation": chosen, "interpret": interpret}, factors, axis)
    x, new = step.run(*arguments)
    return Step(x, new, [{group: kept.counts for group, kept in own.items()} for own in step.kept], step.kept)
