"""The Flax modules of a Llama-family decoder: they declare its parameters and draw their first values.

The arithmetic is in `forward.py`, on plain nested dicts of arrays (`Decoder.params`): a module never crosses a jit
boundary.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.parameters import Params, param_shapes, random_values


class Linear(nnx.Module):
    """`kernel[in, out]`, and a bias where the family has one."""

    def __init__(self, params: Params):
        for name, array in params.items():
            setattr(self, name, nnx.Param(array))


class Block(nnx.Module):
    """One decoder block: its two norms, its seven linear layers and, in Qwen3, the norms of q and k."""

    def __init__(self, params: Params):
        for name, value in params.items():
            setattr(self, name, Linear(value) if name in LAYERS else nnx.Param(value))


class Decoder(nnx.Module):
    """The parameters of a model with random weights, drawn from `rngs`; `Model` is what runs with them."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.config = config
        drawn = random_values(param_shapes(config, dtype), rngs)
        self.embed = nnx.Param(drawn["embed"])
        self.blocks = nnx.List([Block(block) for block in drawn["blocks"]])
        self.norm = nnx.Param(drawn["norm"])
        if "lm_head" in drawn:
            self.lm_head = nnx.Param(drawn["lm_head"])

    @property
    def params(self) -> Params:
        """The parameters as nested dicts (and a list of blocks) of arrays, sharing memory with the modules."""
        return _arrays(self)


def _arrays(value: Any) -> Any:
    """The arrays of a module, as nested dicts and lists."""
    if isinstance(value, nnx.Param):
        return value.get_value()
    if isinstance(value, nnx.List):
        return [_arrays(entry) for entry in value]
    return {name: _arrays(v) for name, v in vars(value).items() if isinstance(v, nnx.Module | nnx.Param)}
