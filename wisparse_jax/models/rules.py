"""What a block linear does where it runs sparse: which channels it skips, and what it adds in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float

from kernels_pallas import sparse_linear
from kernels_pallas.sparse_linear.reference import dot
from kernels_pallas.weight import Weight
from wisparse_jax.models.config import LAYERS


@runtime_checkable
class LayerRule(Protocol):
    """What a block's arithmetic asks of a layer's rule; the searches have rules of their own."""

    @property
    def bias(self) -> Array | None:
        """Added to the layer's output, or None."""
        ...

    def product(self, inputs: Array, weight: Weight) -> Array:
        """What the kept channels add up to, without any bias."""
        ...


class ChannelRule(NamedTuple):
    """`y = (x where |x_i| >= thresholds_i, else 0) @ W + bias`; the layer's own bias is added as ever.

    A pytree. `thresholds` None keeps every channel; `bias` None adds nothing. Neither acts on positions that run dense.
    """

    thresholds: Float[Array, " in_channels"] | None
    bias: Float[Array, "*tokens out"] | None = None

    def product(self, inputs: Float[Array, "*batch in_channels"], weight: Weight) -> Float[Array, "*batch out"]:
        """What the kept channels add up to, without any bias."""
        if self.thresholds is None:
            return dot(inputs, weight)
        return sparse_linear(inputs, weight, self.thresholds, implementation="xla")


# One block's by layer name, of any kind.
LayerRules = Mapping[str, LayerRule]
# One block's rules by layer name; a model's: one such dict per block.
BlockRules = dict[str, ChannelRule]
Rules = list[BlockRules]
# The thresholds alone, float32 [in], by block and layer name.
Thresholds = list[dict[str, Float[Array, "_"]]]


def rules_of(thresholds: Thresholds) -> Rules:
    """Rules of thresholds alone, given by block and layer name."""
    return [{name: ChannelRule(block[name]) for name in LAYERS} for block in thresholds]


def thresholds_of(rules: Rules) -> Thresholds:
    """The thresholds by block and layer name, as the decode kernels take them.

    Raises:
        ValueError: a rule without thresholds, which no kernel runs.
    """
    out = []
    for b, block in enumerate(rules):
        made = {}
        for name in LAYERS:
            if (thresholds := block[name].thresholds) is None:
                raise ValueError(f"block {b}, layer {name}: expected thresholds, found a rule that keeps every channel")
            made[name] = thresholds
        out.append(made)
    return out


def merge_biases(params: dict[str, Any], rules: Rules) -> dict[str, Any]:
    """The parameters with every rule's bias added to its layer's own, for a step whose positions are all sparse."""
    blocks = []
    for block, own in zip(params["blocks"], rules, strict=True):
        made = dict(block)
        for name in LAYERS:
            if (bias := own[name].bias) is not None:
                merged = bias + block[name]["bias"] if "bias" in block[name] else bias
                made[name] = block[name] | {"bias": merged.astype(params["embed"].dtype)}
        blocks.append(made)
    return params | {"blocks": blocks}
