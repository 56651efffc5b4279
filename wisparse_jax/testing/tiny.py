"""A Llama small enough for a unit test, with logits that are not flat."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.model import Model
from wisparse_jax.models.rope import Rope

_BASE = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=56,
    num_blocks=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm_eps=1e-6,
    rope=Rope(),
    context=64,
    windows=(None, None, None),
    bos_token_ids=(0,),
    eos_token_ids=(1,),
)


def tiny_config(**changes: Any) -> LlamaConfig:
    """Three blocks, 32 wide, a vocabulary of 97 and a context of 64, with the given fields changed."""
    return dataclasses.replace(_BASE, **changes)


def tiny_model(config: LlamaConfig | None = None, seed: int = 0) -> Model:
    """A random model whose matrices are large enough that its tokens are not all alike."""
    config = tiny_config() if config is None else config
    return jax.tree.map(lambda w: w * 8 if w.ndim == 2 else w, Model.random(config, nnx.Rngs(seed)))
