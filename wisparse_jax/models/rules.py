"""What a block linear does where it runs sparse: which channels it skips, and what it adds in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import sparse_linear
from kernels_pallas.sparse_linear.reference import dot, read_share
from kernels_pallas.weight import Weight
from wisparse_jax.models.config import LAYERS, LlamaConfig


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
    Of a weight of nested planes they may be `[planes, in]`, ascending along the planes: plane k of channel i is read
    where `|x_i| >= thresholds_ki`.
    """

    thresholds: Float[Array, "*planes in_channels"] | None
    bias: Float[Array, "*tokens out"] | None = None

    def product(self, inputs: Float[Array, "*batch in_channels"], weight: Weight) -> Float[Array, "*batch out"]:
        """What the kept channels add up to, without any bias."""
        if self.thresholds is None:
            return dot(inputs, weight)
        return sparse_linear(inputs, weight, self.thresholds, implementation="xla")

    def skipped(self, inputs: Float[Array, "*batch in_channels"], weight: Weight) -> Float[Array, "*batch"]:
        """The share of the weight's channels, or of its bits, that each token leaves out."""
        if self.thresholds is None:
            return jnp.zeros(inputs.shape[:-1], jnp.float32)
        return 1.0 - read_share(inputs, weight, self.thresholds)

    def times(self, factor: float | Float[Array, ""]) -> ChannelRule:
        """The rule with all thresholds times a factor."""
        return self if self.thresholds is None else self._replace(thresholds=self.thresholds * factor)


class ScaledRule(NamedTuple):
    """A rule whose thresholds are multiplied with a factor of each sequence's own."""

    rule: ChannelRule
    factors: Float[Array, " batch"]

    @property
    def bias(self) -> Array | None:
        """Added to the layer's output, or None."""
        return self.rule.bias

    def product(
        self, inputs: Float[Array, "batch *tokens in_channels"], weight: Weight
    ) -> Float[Array, "batch *tokens out"]:
        """What the kept channels add up to, without any bias."""
        return jax.vmap(lambda own, factor: self.rule.times(factor).product(own, weight))(inputs, self.factors)

    def skipped(
        self, inputs: Float[Array, "batch *tokens in_channels"], weight: Weight
    ) -> Float[Array, "batch *tokens"]:
        """The share of the weight's channels, or of its bits, that each token leaves out."""
        return jax.vmap(lambda own, factor: self.rule.times(factor).skipped(own, weight))(inputs, self.factors)


# One block's by layer name, of any kind.
LayerRules = Mapping[str, LayerRule]
# One block's rules by layer name; a model's: one such dict per block.
BlockRules = dict[str, ChannelRule]
Rules = list[BlockRules]
# The same with factors.
ScaledRules = list[dict[str, ScaledRule]]
# The thresholds alone, float32 [in] or [planes, in], by block and layer name.
Thresholds = list[dict[str, Float[Array, "..."]]]


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
        layers = {}
        for name in LAYERS:
            if (thresholds := block[name].thresholds) is None:
                raise ValueError(f"block {b}, layer {name}: expected thresholds, found a rule that keeps every channel")
            layers[name] = thresholds
        out.append(layers)
    return out


def scaled_rules(rules: Rules, factors: Float[Array, " batch"]) -> ScaledRules:
    """The rules with all thresholds of a sequence multiplied with its factor."""
    return [{name: ScaledRule(rule, factors) for name, rule in block.items()} for block in rules]


def multiplied_rules(rules: Rules, factor: float) -> Rules:
    """The rules with all thresholds times one factor."""
    return [{name: rule.times(factor) for name, rule in block.items()} for block in rules]


def layer_skips(
    rules: Sequence[Mapping[str, ChannelRule | ScaledRule]],
    records: Sequence[Mapping[str, Array]],
    blocks: Sequence[Mapping[str, Any]],
) -> Float[Array, "*tokens blocks 7"]:
    """The share of channels, or of bits, that each layer skips for each token, from what `hidden_states` recorded."""
    shares = [
        jnp.stack([layer_rules[name].skipped(inputs[name], Weight.of(block[name])) for name in LAYERS], axis=-1)
        for layer_rules, inputs, block in zip(rules, records, blocks, strict=True)
    ]
    return jnp.stack(shares, axis=-2)


def mean_skipped(config: LlamaConfig, shares: Float[Array, "*tokens blocks 7"]) -> Float[Array, "*tokens"]:
    """Each token's mean over all layers, weighted by their numbers of weights."""
    weights = jnp.asarray(config.layer_weights, jnp.float32)
    return jnp.mean(shares @ (weights / weights.sum()), axis=-1)


def merge_biases(params: dict[str, Any], rules: Rules) -> dict[str, Any]:
    """The parameters with every rule's bias added to its layer's own, for a step whose positions are all sparse."""
    blocks = []
    for block, layer_rules in zip(params["blocks"], rules, strict=True):
        layers = dict(block)
        for name in LAYERS:
            if (bias := layer_rules[name].bias) is not None:
                merged = bias + block[name]["bias"] if "bias" in block[name] else bias
                layers[name] = block[name] | {"bias": merged.astype(params["embed"].dtype)}
        blocks.append(layers)
    return params | {"blocks": blocks}
