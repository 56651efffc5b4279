"""Names that others took the place of; the next version is without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wisparse_jax.errors import PlanError
from wisparse_jax.models.model import Model
from wisparse_jax.search import calibrate_to_kl as calibrate_to_divergence  # noqa: F401
from wisparse_jax.sparsity import SparsityPlan, apply, convert, load, own_plan


def load_sparse(
    name: Any, plan: Any = None, dtype: Any = None, weights: Any = None, head: Any = None, mesh: Any = None
):
    """`load(name, plan=plan)`, of a model that has one where none is given."""
    if plan is None and own_plan(name) is None:
        raise PlanError(f"{name}: expected a plan, or a model that was converted together with one")
    return load(name, dtype, weights, head, plan=plan, mesh=mesh)


def apply_plans(model: Model, plans: Mapping[str, SparsityPlan], weights: Any = None, head: Any = None):
    """`apply(model, plans)`."""
    return apply(model, plans, weights, head)


def convert_with_plan(
    name: Any, out: Any, plan: Any, weights: Any = None, head: Any = None, dtype: Any = None, tokens: Any = None
):
    """`convert(name, out, plan=plan)`."""
    convert(name, out, weights, head, dtype, tokens, plan=plan)


class Llama:
    """`Model.random(config, rngs)`."""

    def __new__(cls, config: Any, rngs: Any = None, dtype: Any = "float32", params: Any = None) -> Any:
        """A `Model`."""
        return Model.random(config, rngs, dtype) if params is None else Model(config, params)

    @staticmethod
    def from_params(config: Any, params: Any) -> Model:
        """`Model(config, params)`."""
        return Model(config, params)


class SparseLlama:
    """`Model(config, params, rules)`."""

    def __new__(cls, config: Any, params: Any, rules: Any, plan: Any = None) -> Any:
        """A `Model`."""
        return Model(config, params).with_rules(rules, plan)
