"""A model together with a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import overload

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from wisparse_jax.errors import PlanError, WisparseError
from wisparse_jax.models.basis import Basis, fold, folded_config
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.fingerprint import model_fingerprint
from wisparse_jax.models.forward import Params
from wisparse_jax.models.model import Model
from wisparse_jax.models.rules import BlockRules, Rules
from wisparse_jax.sparsity.plan import SparsityPlan
from wisparse_jax.sparsity.score import ChannelGains, block_rules, model_norms


@overload
def apply(model: Model, plan: SparsityPlan, weights: str | None = None, head: str | None = None) -> Model: ...


@overload
def apply(
    model: Model, plan: Mapping[str, SparsityPlan], weights: str | None = None, head: str | None = None
) -> dict[str, Model]: ...


def apply(
    model: Model,
    plan: SparsityPlan | Mapping[str, SparsityPlan],
    weights: str | None = None,
    head: str | None = None,
) -> Model | dict[str, Model]:
    """The model with a plan, whose basis is folded into a copy of the weights; a plan that it has already is left out.

    Args:
        model: in float weights, unless the plan has no basis or the model is folded into it.
        plan: one, or several by any name: then a model each, and those of one basis share one copy.
        weights: rounds the block linears to a format, such as "int8", after folding; a plan for planes has its own.
        head: "int8" rounds the head.

    Raises:
        PlanError: the plan was made for another model, or has a basis while the model is folded into another, or its
            weights are quantised already.
        WisparseError: no such kind of weights.
    """
    if isinstance(plan, SparsityPlan):
        return apply(model, {"plan": plan}, weights, head)["plan"]
    from wisparse_jax.models.quantise import quantise

    folded: dict[tuple[str | None, str | None], Model] = {}
    sparse = {}
    for name, one in plan.items():
        one.check_model(model_fingerprint(model), model.config)
        kind = one.weights(weights)
        key = None if one.basis is None else one.basis.digest(), kind
        if key not in folded:
            dense = in_basis(model.dense, one.basis)
            # Weights in the planes of a plan may be there already: another number of bits is another set of rules.
            kind = None if one.planes is not None and dense.weights == kind else kind
            folded[key] = dense if kind is None and head is None else quantise(dense, kind, head)
        sparse[name] = folded[key].with_rules(plan_rules(folded[key].params, one), one)
    return sparse


def in_basis(model: Model, basis: Basis | None) -> Model:
    """The model folded into a plan's basis, as a copy; the model itself where it is so already.

    Raises:
        PlanError: it is folded into another basis, or its weights are quantised already.
    """
    wanted = None if basis is None else basis.digest()
    if model.basis_digest == wanted:
        return model
    if basis is None or model.basis_digest is not None:
        raise PlanError("plan is for the model as it was: this one is folded into the basis of another plan")
    config = folded_config(model.config)
    try:
        params = fold(model.config, model.params, basis)
    except WisparseError as error:
        raise PlanError(f"plan has a basis: {error}; load the model together with the plan") from None
    return model.with_weights(config, params, wanted)


def plan_rules(params: Params, plan: SparsityPlan) -> Rules:
    """What every layer does under a plan; `params` are those of the folded model where the plan has a basis."""
    if plan.planes is not None:
        return plan.planes.rules(plan.layer_weights, plan.target)
    gains = model_norms(params) if plan.gains is None else plan.gains
    rules = threshold_rules(gains, plan.exponents, plan.thresholds)
    return rules if plan.biases is None else with_biases(rules, plan.biases)


def threshold_rules(
    gains: list[ChannelGains], exponents: Float64[np.ndarray, "blocks 7"], thresholds: Float64[np.ndarray, "blocks 7"]
) -> Rules:
    """The threshold of every channel, on |x_i|, from those of every layer, on the score."""
    alpha, threshold = jnp.asarray(exponents, jnp.float32), jnp.asarray(thresholds, jnp.float32)
    return [block_rules(block, alpha[b], threshold[b]) for b, block in enumerate(gains)]


def with_biases(rules: Rules, biases: list[dict[str, Float[Array, "_"]]]) -> Rules:
    """The rules with a bias each."""

    def one(block: BlockRules, own: dict[str, Float[Array, "_"]]) -> BlockRules:
        return {name: block[name]._replace(bias=own[name]) for name in LAYERS}

    return [one(block, own) for block, own in zip(rules, biases, strict=True)]
