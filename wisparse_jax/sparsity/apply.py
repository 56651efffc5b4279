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
from wisparse_jax.models.basis import fold, folded_config
from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.fingerprint import model_fingerprint
from wisparse_jax.models.forward import Params, logits
from wisparse_jax.models.llama import Llama
from wisparse_jax.models.mesh import mesh_of, spread
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
    plan.check_model(model_fingerprint(model), model.config.num_blocks)
    config, params, basis = model.config, model.params, plan.basis
    folded = model.basis_digest
    wanted = None if basis is None else basis.digest()
    if folded is not None and folded != wanted:
        raise PlanError("plan is for the model as it was: this one is folded into the basis of another plan")
    if basis is not None and folded is None:
        try:
            config, params = folded_config(config), fold(config, params, basis)
        except WisparseError as error:
            raise PlanError(f"plan has a basis: {error}; load the model together with the plan") from None
    return SparseLlama(config, params, plan_rules(params, plan), plan)


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
    plan: SparsityPlan,
    dtype: str | None = None,
    weights: str | None = None,
    head: str | None = None,
    mesh: str | Mapping[str, int] | Mesh | None = None,
) -> SparseLlama:
    """Load a model together with a plan: a basis is folded in tensor by tensor, before any rounding to integers.

    Memory holds the model and its largest tensor; arguments and errors as in `models.loading.load` and `apply`.
    """
    from wisparse_jax.models.loading import load

    return apply(load(name, dtype, weights, plan.basis, head=head, check=plan.check_model, mesh=mesh), plan)
