"""A model together with a plan."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.forward import Params, Thresholds, logits
from wisparse_jax.models.llama import Llama
from wisparse_jax.models.loading import model_fingerprint
from wisparse_jax.sparsity.plan import SparsityPlan
from wisparse_jax.sparsity.score import BlockNorms, block_thresholds, model_norms


@dataclasses.dataclass(frozen=True)
class SparseLlama:
    """A model that skips the channels its plan says; called like the dense one, sparse at every position."""

    model: Llama
    plan: SparsityPlan
    thresholds: Thresholds

    @property
    def config(self) -> LlamaConfig:
        """The architecture."""
        return self.model.config

    @property
    def params(self) -> Params:
        """The weights, those of the dense model."""
        return self.model.params

    def __call__(
        self,
        tokens: Int[Array, "batch length"] | Int[np.ndarray, "batch length"],
        start: Int[Array, " batch"] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Next-token logits, float32; `start[b]` is where row b begins in a left-padded batch (default 0)."""
        return logits(self.config, self.params, jnp.asarray(tokens), start, self.thresholds)


def apply(model: Llama, plan: SparsityPlan) -> SparseLlama:
    """Run the model with the plan.

    Raises:
        PlanError: the plan was made for another model.
    """
    plan.check_model(model_fingerprint(model), model.config.num_blocks)
    norms = model_norms(model.params)
    return SparseLlama(model, plan, plan_thresholds(norms, plan.exponents, plan.thresholds))


def plan_thresholds(
    norms: list[BlockNorms],
    exponents: Float64[np.ndarray, "blocks 7"],
    taus: Float64[np.ndarray, "blocks 7"],
) -> Thresholds:
    """The per-channel thresholds of every layer."""
    alpha, tau = jnp.asarray(exponents, jnp.float32), jnp.asarray(taus, jnp.float32)
    return [block_thresholds(block, alpha[b], tau[b]) for b, block in enumerate(norms)]
