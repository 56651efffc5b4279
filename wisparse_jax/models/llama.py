"""The modules of a Llama-family decoder, around the parameters that `parameters.py` declares.

The arithmetic is in `forward.py`, on plain nested dicts of arrays (`Llama.params`): a module never crosses a jit
boundary.
"""

from __future__ import annotations

import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.forward import logits
from wisparse_jax.models.mesh import mesh_of, spread
from wisparse_jax.models.parameters import Params, param_shapes, random_values
from wisparse_jax.models.tokens import token_rows


class Linear(nnx.Module):
    """`kernel[in, out]`, a bias where the family has one, and a scale where the kernel is int8 or int4 (`Weight`)."""

    def __init__(self, params: Params):
        for name, array in params.items():
            setattr(self, name, nnx.Param(array))


class Block(nnx.Module):
    """One decoder block: its two norms, its seven linear layers and, in Qwen3, the norms of q and k."""

    def __init__(self, params: Params):
        for name, value in params.items():
            setattr(self, name, Linear(value) if name in LAYERS else nnx.Param(value))


class _Origin:
    """Which checkpoint some arrays were loaded from; JAX's arrays do not change, so other weights are other arrays."""

    def __init__(self, fingerprint: str, params: Params):
        self.fingerprint, self._leaves = fingerprint, [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]

    def of(self, params: Params) -> bool:
        """Whether these are the arrays that were loaded."""
        leaves = jax.tree.leaves(params)
        return [id(leaf) for leaf in leaves] == [id(reference()) for reference in self._leaves]


class Llama(nnx.Module):
    """A Llama-family language model.

    `model(tokens)` gives the next-token logits of every position; `model.params` is the plain pytree that every
    compiled function takes. Weights are `[in, out]`.
    """

    name: str | None = None  # of the folder or the hub id that it was loaded from
    _origin: _Origin | None = None
    basis_digest: str | None = None  # of the basis that its weights are folded into

    def __init__(
        self, config: LlamaConfig, rngs: nnx.Rngs | None = None, dtype: Any = jnp.float32, params: Params | None = None
    ):
        """A model with random weights, drawn from `rngs`, or around existing arrays, `params`; see `from_params`."""
        self.config = config
        given = params or random_values(param_shapes(config, dtype), nnx.Rngs(0) if rngs is None else rngs)
        self.embed = nnx.Param(given["embed"])
        self.blocks = nnx.List([Block(block) for block in given["blocks"]])
        self.norm = nnx.Param(given["norm"])
        if "lm_head" in given:
            # A head in int8 has a scale, and a tied model has one beside its embedding.
            head = given["lm_head"]
            self.lm_head = Linear(head) if isinstance(head, dict) else nnx.Param(head)

    @classmethod
    def from_params(cls, config: LlamaConfig, params: Params) -> Llama:
        """A model around existing arrays, which are not copied; their shapes must be those of `param_shapes`."""
        return cls(config, params=params)

    @property
    def fingerprint(self) -> str | None:
        """That of the checkpoint that it was loaded from; None for a model made otherwise, or changed since."""
        return self._origin.fingerprint if self._origin is not None and self._origin.of(self.params) else None

    @fingerprint.setter
    def fingerprint(self, value: str | None) -> None:
        self._origin = None if value is None else _Origin(value, self.params)

    @property
    def params(self) -> Params:
        """The parameters as nested dicts (and a list of blocks) of arrays, sharing memory with the module."""
        return _arrays(self)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of weights and activations."""
        return self.embed[...].dtype

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
        params = self.params
        ids = tokens if traced else spread(mesh_of(params), token_rows(tokens, self.config.vocab_size))
        return logits(self.config, params, ids, start)


def _arrays(value: Any) -> Any:
    """The arrays of a module, as nested dicts and lists."""
    if isinstance(value, nnx.Param):
        return value.get_value()
    if isinstance(value, nnx.List):
        return [_arrays(entry) for entry in value]
    return {name: _arrays(v) for name, v in vars(value).items() if isinstance(v, nnx.Module | nnx.Param)}
