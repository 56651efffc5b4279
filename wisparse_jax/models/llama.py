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
from jaxtyping import Array, Float, Int

from kernels_pallas.weight import GROUP, Weight
from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.forward import logits

Params = dict[str, Any]


class Linear(nnx.Module):
    """`kernel[in, out]`, a bias where the family has one, and a scale where the kernel is int8 or int4 (`Weight`)."""

    def __init__(self, shape: tuple[int, int], bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs, kind: str | None):
        size_in, size_out = shape
        if kind == "int8":
            self.kernel = nnx.Param(jnp.zeros(shape, jnp.int8))
            self.scale = nnx.Param(jnp.ones(size_out, jnp.float32))
        elif kind == "int4":
            self.kernel = nnx.Param(jnp.zeros((size_in, size_out // 2), jnp.uint8))
            self.scale = nnx.Param(jnp.ones((-(-size_out // GROUP), size_in), jnp.bfloat16))
        else:
            self.kernel = nnx.Param(_normal(rngs, shape, dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros(shape[1], dtype))


class Block(nnx.Module):
    """One decoder block: its two norms, its seven linear layers and, in Qwen3, the norms of q and k."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype, rngs: nnx.Rngs, kind: str | None):
        self.attn_norm = nnx.Param(jnp.ones(config.hidden_size, dtype))
        self.mlp_norm = nnx.Param(jnp.ones(config.hidden_size, dtype))
        biased = dict.fromkeys(("q", "k", "v"), config.qkv_bias) | {"o": config.o_bias}
        for name in LAYERS:
            layer = Linear(config.layer_shapes[name], biased.get(name, config.mlp_bias), dtype, rngs, kind)
            setattr(self, name, layer)
        if config.qk_norm:
            self.q_norm = nnx.Param(jnp.ones(config.head_dim, dtype))
            self.k_norm = nnx.Param(jnp.ones(config.head_dim, dtype))


class Llama(nnx.Module):
    """A Llama-family language model.

    `model(tokens)` gives the next-token logits of every position; `model.params` is the plain pytree that every
    compiled function takes. Weights are `[in, out]`.
    """

    fingerprint: str | None = None  # of the checkpoint that it was loaded from

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, dtype: Any = jnp.float32, kind: str | None = None):
        self.config = config
        dtype = jnp.dtype(dtype)
        self.embed = nnx.Param(_normal(rngs, (config.vocab_size, config.hidden_size), dtype))
        self.blocks = nnx.List([Block(config, dtype, rngs, kind) for _ in range(config.num_blocks)])
        self.norm = nnx.Param(jnp.ones(config.hidden_size, dtype))
        if not config.tied_embeddings:
            self.lm_head = nnx.Param(_normal(rngs, (config.hidden_size, config.vocab_size), dtype))

    @classmethod
    def from_params(cls, config: LlamaConfig, params: Params) -> Llama:
        """A model around existing arrays, which are not copied; their shapes must be those of `param_shapes`."""
        first = params["blocks"][0]["q"]
        kind = Weight.of(first).kind if "scale" in first else None
        graph, state = nnx.split(abstract_llama(config, kind=kind))
        for path, leaf in nnx.to_flat_state(state):
            value: Any = params
            for key in path:
                value = value[key]
            leaf.set_value(value) if hasattr(leaf, "set_value") else setattr(leaf, "value", value)
        return nnx.merge(graph, state)

    @property
    def params(self) -> Params:
        """The parameters as nested dicts (and a list of blocks) of arrays, sharing memory with the module."""
        return _plain(nnx.to_pure_dict(nnx.state(self, nnx.Param)))

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of weights and activations."""
        return self.embed[...].dtype

    def __call__(
        self,
        tokens: Int[Array, "batch length"] | Int[np.ndarray, "batch length"],
        start: Int[Array, " batch"] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Next-token logits, float32. `start[b]` is where row b begins in a left-padded batch (default 0)."""
        return logits(self.config, self.params, jnp.asarray(tokens), start)


def abstract_llama(config: LlamaConfig, dtype: Any = jnp.float32, kind: str | None = None) -> Llama:
    """The model with shapes and dtypes in place of arrays; of "int8" or "int4" block linears where the kind is that."""
    return nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0), dtype, kind))


def param_shapes(config: LlamaConfig, dtype: Any = jnp.float32) -> Params:
    """The plain parameter pytree with `jax.ShapeDtypeStruct` leaves."""
    return _plain(nnx.to_pure_dict(nnx.state(abstract_llama(config, dtype), nnx.Param)))


def _normal(rngs: nnx.Rngs, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
    return (0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)


def _plain(tree: Any) -> Any:
    """Nested dicts, those keyed 0..n-1 made lists."""
    if not isinstance(tree, dict):
        return tree
    if tree and all(isinstance(key, int) for key in tree):
        return [_plain(tree[i]) for i in range(len(tree))]
    return {key: _plain(value) for key, value in tree.items()}
