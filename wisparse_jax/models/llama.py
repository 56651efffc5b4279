"""The modules of a Llama-family decoder: which parameters there are, their shapes and initial values.

The arithmetic is in `forward.py`, on plain nested dicts of arrays (`Llama.params`): a module never crosses a jit
boundary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.forward import logits
from wisparse_jax.models.tokens import token_rows

Params = dict[str, Any]


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


class Llama(nnx.Module):
    """A Llama-family language model.

    `model(tokens)` gives the next-token logits of every position; `model.params` is the plain pytree that every
    compiled function takes. Weights are `[in, out]`.
    """

    name: str | None = None  # of the folder or the hub id that it was loaded from
    fingerprint: str | None = None  # of the checkpoint that it was loaded from
    basis_digest: str | None = None  # of the basis that its weights are folded into

    def __init__(
        self, config: LlamaConfig, rngs: nnx.Rngs | None = None, dtype: Any = jnp.float32, params: Params | None = None
    ):
        """A model with random weights, drawn from `rngs`, or around existing arrays, `params`; see `from_params`."""
        self.config = config
        given = params or _random(param_shapes(config, dtype), nnx.Rngs(0) if rngs is None else rngs)
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
        ids = tokens if traced else jnp.asarray(token_rows(tokens, self.config.vocab_size))
        return logits(self.config, self.params, ids, start)


def param_shapes(config: LlamaConfig, dtype: Any = jnp.float32) -> Params:
    """The plain parameter pytree with `jax.ShapeDtypeStruct` leaves: which parameters there are."""

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    biased = dict.fromkeys(("q", "k", "v"), config.qkv_bias) | {"o": config.o_bias}
    block: Params = {"attn_norm": leaf(config.hidden_size), "mlp_norm": leaf(config.hidden_size)}
    for name in LAYERS:
        size, out = config.layer_shapes[name]
        block[name] = {"kernel": leaf(size, out)} | ({"bias": leaf(out)} if biased.get(name, config.mlp_bias) else {})
    if config.qk_norm:
        block |= {"q_norm": leaf(config.head_dim), "k_norm": leaf(config.head_dim)}
    # Copies, so that a caller who changes one block's entry changes no other's.
    blocks = [
        {name: dict(v) if isinstance(v, dict) else v for name, v in block.items()} for _ in range(config.num_blocks)
    ]
    shapes = {"embed": leaf(config.vocab_size, config.hidden_size), "blocks": blocks, "norm": leaf(config.hidden_size)}
    return shapes if config.tied_embeddings else shapes | {"lm_head": leaf(config.hidden_size, config.vocab_size)}


def _random(shapes: Any, rngs: nnx.Rngs, name: str = "") -> Any:
    """Arrays of the given shapes, in the order they are listed: small normal matrices, ones, and biases of zero."""
    if isinstance(shapes, dict):
        return {key: _random(value, rngs, key) for key, value in shapes.items()}
    if isinstance(shapes, list):
        return [_random(value, rngs) for value in shapes]
    if len(shapes.shape) == 2:
        return (0.02 * jax.random.normal(rngs.params(), shapes.shape, jnp.float32)).astype(shapes.dtype)
    return (jnp.zeros if name == "bias" else jnp.ones)(shapes.shape, shapes.dtype)


def _arrays(value: Any) -> Any:
    """The arrays of a module, as nested dicts and lists."""
    if isinstance(value, nnx.Param):
        return value.get_value()
    if isinstance(value, nnx.List):
        return [_arrays(entry) for entry in value]
    return {name: _arrays(v) for name, v in vars(value).items() if isinstance(v, nnx.Module | nnx.Param)}
