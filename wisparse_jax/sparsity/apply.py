"""A model together with a plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float64, Int

from wisparse_jax.errors import PlanError, WisparseError
from wisparse_jax.models.basis import Basis, fold, folded_config
from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.fingerprint import model_fingerprint
from wisparse_jax.models.forward import Params, logits
from wisparse_jax.models.llama import Llama
from wisparse_jax.models.mesh import mesh_of, place_on, spread
from wisparse_jax.models.rules import BlockRules, Rules, Thresholds, thresholds_of
from wisparse_jax.sparsity.plan import SparsityPlan
from wisparse_jax.sparsity.score import ChannelGains, block_rules, model_norms


@jax.tree_util.register_pytree_node_class
class SparseLlama:
    """A model that skips the channels its plan says; called like the dense one, sparse at every position.

    A pytree of its weights and rules, which `jax.jit`, `jax.vmap` and `jax.grad` take as an argument; what comes out of
    them has forgotten its plan. With a plan that has a basis the weights are the folded ones.
    """

    plan: SparsityPlan | None = None

    def __init__(self, config: LlamaConfig, params: Params, rules: Rules, plan: SparsityPlan | None = None):
        self.config, self.params, self.rules, self.plan = config, params, rules, plan

    def tree_flatten(self) -> tuple[tuple[Any, Any], LlamaConfig]:
        """The leaves' subtrees, and what is static."""
        return (self.params, self.rules), self.config

    @classmethod
    def tree_unflatten(cls, config: LlamaConfig, children: tuple[Any, Any]) -> SparseLlama:
        """The model around whatever leaves JAX puts in."""
        made = object.__new__(cls)
        made.config, (made.params, made.rules) = config, children
        return made

    @property
    def model(self) -> Llama:
        """The dense model with these weights."""
        return Llama.from_params(self.config, self.params)

    @property
    def thresholds(self) -> Thresholds:
        """The smallest |x_i| that each layer keeps, by block and layer name."""
        return thresholds_of(self.rules)

    def __call__(
        self,
        tokens: Int[Array, "batch length"] | Int[np.ndarray, "batch length"],
        start: Int[Array, " batch"] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Next-token logits, float32; `start[b]` is where row b begins in a left-padded batch (default 0)."""
        mesh = None if isinstance(tokens, Tracer) else mesh_of(self.params)
        ids = jnp.asarray(tokens) if mesh is None else spread(mesh, np.asarray(tokens))
        return logits(self.config, self.params, ids, start, self.rules)


def apply(model: Llama, plan: SparsityPlan) -> SparseLlama:
    """Run the model with the plan; one with a basis folds it into a copy of the weights.

    Raises:
        PlanError: the plan was made for another model, or has a basis while the model is folded into another, or its
            weights are quantised already.
    """
    return apply_plans(model, {"plan": plan})["plan"]


def apply_plans(
    model: Llama, plans: Mapping[str, SparsityPlan], weights: str | None = None, head: str | None = None
) -> dict[str, SparseLlama]:
    """Run the model with each of several plans; those of one basis share one folded copy of the weights.

    Args:
        model: the dense model.
        plans: by any name.
        weights: "int8" or "int4" rounds the block linears, after folding.
        head: "int8" rounds the head.

    Raises:
        PlanError: as in `apply`.
        WisparseError: no such kind of weights.
    """
    from wisparse_jax.models.quantise import quantise

    made: dict[str | None, Llama] = {}
    out = {}
    for name, plan in plans.items():
        plan.check_model(model_fingerprint(model), model.config)
        key = None if plan.basis is None else plan.basis.digest()
        if key not in made:
            own = in_basis(model, plan.basis)
            made[key] = own if weights is None and head is None else quantise(own, weights, head)
        out[name] = SparseLlama(made[key].config, made[key].params, plan_rules(made[key].params, plan), plan)
    return out


def in_basis(model: Llama, basis: Basis | None) -> Llama:
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
    made = Llama.from_params(config, place_on(mesh_of(model.params), config, params))
    made.name, made.fingerprint, made.basis_digest = model.name, model_fingerprint(model), wanted
    return made


def plan_rules(params: Params, plan: SparsityPlan) -> Rules:
    """What every layer does under a plan; `params` are those of the folded model where the plan has a basis."""
    gains = model_norms(params) if plan.gains is None else plan.gains
    rules = threshold_rules(gains, plan.exponents, plan.thresholds)
    return rules if plan.biases is None else with_biases(rules, plan.biases)


def threshold_rules(
    gains: list[ChannelGains], exponents: Float64[np.ndarray, "blocks 7"], taus: Float64[np.ndarray, "blocks 7"]
) -> Rules:
    """The per-channel thresholds of every layer."""
    alpha, tau = jnp.asarray(exponents, jnp.float32), jnp.asarray(taus, jnp.float32)
    return [block_rules(block, alpha[b], tau[b]) for b, block in enumerate(gains)]


def with_biases(rules: Rules, biases: list[dict[str, Float[Array, "_"]]]) -> Rules:
    """The rules with a bias each."""

    def one(block: BlockRules, own: dict[str, Float[Array, "_"]]) -> BlockRules:
        return {name: block[name]._replace(bias=own[name]) for name in LAYERS}

    return [one(block, own) for block, own in zip(rules, biases, strict=True)]


def load_sparse(
    name: str | Path,
    plan: SparsityPlan | str | Path | None = None,
    dtype: str | None = None,
    weights: str | None = None,
    head: str | None = None,
    mesh: str | Mapping[str, int] | Mesh | None = None,
) -> SparseLlama:
    """Load a model together with a plan: a basis is folded in tensor by tensor, before any rounding to integers.

    Memory holds the model and what is on its way, see `models.weights.read_weights`; the other arguments and errors as
    in `models.loading.load` and `apply`.

    Args:
        name: of the model.
        plan: a plan, or what `SparsityPlan.load` takes; None is the one inside a model that was converted with it.
    """
    from wisparse_jax.models.loading import load
    from wisparse_jax.sparsity.converted import own_plan

    if plan is None:
        if (plan := own_plan(name)) is None:
            raise PlanError(f"{name}: expected a plan, or a model that was converted together with one")
    elif not isinstance(plan, SparsityPlan):
        plan = SparsityPlan.load(plan)
    return apply(load(name, dtype, weights, plan.basis, head=head, check=plan.check_model, mesh=mesh), plan)
