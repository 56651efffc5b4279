"""A model: an architecture, its weights, what its layers skip, and where it comes from."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from kernels_pallas.weight import Weight
from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.decoder import Decoder
from wisparse_jax.models.fingerprint import model_fingerprint
from wisparse_jax.models.forward import logits
from wisparse_jax.models.mesh import mesh_of, place_on, spread
from wisparse_jax.models.parameters import Params
from wisparse_jax.models.rules import Rules, Thresholds, thresholds_of
from wisparse_jax.models.tokens import token_rows


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a model comes from; nothing of it is known for one that was made of arrays."""

    name: str | None = None  # of the folder or the hub id that it was loaded from
    fingerprint: str | None = None  # of the checkpoint that it was loaded from
    basis_digest: str | None = None  # of the basis that its weights are folded into
    plan: Any = None  # the `SparsityPlan` that its rules were made of


class _Leaves:
    """Which arrays a pytree had; JAX's arrays do not change, so other numbers are other arrays."""

    def __init__(self, tree: Any):
        self._leaves = [weakref.ref(leaf) for leaf in jax.tree.leaves(tree)]

    def are_of(self, tree: Any) -> bool:
        """Whether a pytree has these arrays and no others."""
        return [id(leaf) for leaf in jax.tree.leaves(tree)] == [id(reference()) for reference in self._leaves]


@jax.tree_util.register_pytree_node_class
class Model:
    """A Llama-family language model: `model(tokens)` gives the next-token logits of every position.

    With rules it is sparse, at every position of such a call; `generate` and `evaluate` run prompts dense. A pytree of
    its weights and rules, which `jax.jit`, `jax.vmap` and `jax.grad` take as an argument. What comes out of them has
    forgotten where it comes from, its plan too.
    """

    _origin = Origin()

    def __init__(self, config: LlamaConfig, params: Params, rules: Rules | None = None, origin: Origin | None = None):
        """A model around existing arrays, which are not copied.

        Args:
            config: the architecture.
            params: nested dicts (and a list of blocks) of arrays, as `param_shapes` has them; weights are `[in, out]`.
            rules: what each layer skips and adds; None for a dense model.
            origin: where exactly these arrays come from.
        """
        self.config, self.params, self.rules = config, params, rules
        if origin is not None:
            self._origin, self._loaded, self._applied = origin, _Leaves(params), _Leaves(rules)

    @classmethod
    def random(cls, config: LlamaConfig, rngs: nnx.Rngs | None = None, dtype: Any = jnp.float32) -> Model:
        """A model with the random weights that `Decoder` draws; from seed 0 by default."""
        return cls(config, Decoder(config, nnx.Rngs(0) if rngs is None else rngs, dtype).params)

    def tree_flatten(self) -> tuple[tuple[Any, Any], LlamaConfig]:
        """What JAX traces, the parameters and the rules, and what it compiles for, the configuration."""
        return (self.params, self.rules), self.config

    @classmethod
    def tree_unflatten(cls, config: LlamaConfig, children: tuple[Any, Any]) -> Model:
        """The model around whatever leaves JAX puts in."""
        model = object.__new__(cls)
        model.config, (model.params, model.rules) = config, children
        return model

    @property
    def name(self) -> str | None:
        """The name of the folder, or the hub id, that the model was loaded from."""
        return self._origin.name

    @property
    def basis_digest(self) -> str | None:
        """The digest of the basis that the weights are folded into; None for the checkpoint's own basis."""
        return self._origin.basis_digest

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the checkpoint it was loaded from; None for a model made otherwise, or changed since."""
        known = self._origin.fingerprint
        return known if known is not None and self._loaded.are_of(self.params) else None

    @property
    def plan(self) -> Any:
        """The `SparsityPlan` that it runs; None for a dense model, for other rules, and for rules changed since."""
        return self._origin.plan if self._origin.plan is not None and self._applied.are_of(self.rules) else None

    @property
    def dense(self) -> Model:
        """The model with these weights and without rules."""
        return self if self.rules is None else self.with_rules(None)

    @property
    def thresholds(self) -> Thresholds | None:
        """The smallest |x_i| that each layer keeps, float32 [in], by block and layer name; None for a dense model."""
        return None if self.rules is None else thresholds_of(self.rules)

    @property
    def weights(self) -> str:
        """The kind of the block linears' weights: "int8", "int4" or a dtype's name."""
        return Weight.of(self.params["blocks"][0]["q"]).kind

    @property
    def head(self) -> str:
        """The kind of the head's weights: "int8" or a dtype's name."""
        weight = self.params.get("lm_head")
        return Weight.of(weight).kind if isinstance(weight, dict) else self.dtype.name

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations, and of the weights that are not rounded to integers."""
        return self.params["embed"].dtype

    def with_rules(self, rules: Rules | None, plan: Any = None) -> Model:
        """The same weights with rules, such as those of a plan, or with none."""
        origin = dataclasses.replace(self._origin, fingerprint=self.fingerprint, plan=plan)
        return Model(self.config, self.params, rules, origin)

    def with_weights(self, config: LlamaConfig, params: Params, basis_digest: str | None) -> Model:
        """The dense model with its weights in another form, rounded or folded, which its plans still apply to.

        They are laid out over the devices as the model's are.
        """
        origin = Origin(self.name, model_fingerprint(self), basis_digest)
        return Model(config, place_on(mesh_of(self.params), config, params), None, origin)

    def __call__(
        self,
        tokens: Int[Array, "batch length"] | Int[np.ndarray, "batch length"],
        start: Int[Array, " batch"] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Next-token logits, float32. `start[b]` is where row b begins in a left-padded batch (default 0).

        Raises:
            WisparseError: tokens that are not rows of ids of the vocabulary.
        """
        # Of a function that is being compiled no values are known.
        traced = isinstance(tokens, Tracer)
        ids = tokens if traced else spread(mesh_of(self.params), token_rows(tokens, self.config.vocab_size))
        return logits(self.config, self.params, ids, start, self.rules)
