"""What a TPU would run of a model, lowered where there is none: whole programs at a real model's shapes, two blocks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct as Shape
from jax import export

from wisparse_jax.inference import Sample
from wisparse_jax.inference.loop import decode, prefill
from wisparse_jax.models.config import LAYERS, LlamaConfig, read_config
from wisparse_jax.models.forward import empty_cache, logits
from wisparse_jax.models.parameters import param_shapes
from wisparse_jax.models.rules import ChannelRule, Rules
from wisparse_jax.search.losses import _kl_of_candidates

SPARSE, WINDOWS, CANDIDATES = 32, 4, 8


@pytest.fixture(scope="module")
def config(repository: Path) -> LlamaConfig:
    config = read_config(repository / "configs/llama-3.2-1b.json")
    return dataclasses.replace(config, num_blocks=2, windows=config.windows[:2])


def numbers(*shape: int, dtype: Any = jnp.float32) -> Any:
    return Shape(shape, dtype)


def rules_of(config: LlamaConfig) -> Rules:
    shapes = config.layer_shapes
    return [{n: ChannelRule(numbers(shapes[n][0]), numbers(shapes[n][1])) for n in LAYERS} for _ in range(2)]


def lowered(function: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    """For a TPU, and what comes out. Nothing is a custom call but for sharding: nothing of another backend is left."""
    made = export.export(jax.jit(function), platforms=["tpu"])(*arguments)
    text = made.mlir_module()
    calls = set(re.findall(r"custom_call @([\w.$]+)", text))
    assert calls <= {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}, calls
    return text, made.out_avals


def bfloat16_products(text: str) -> int:
    return len(re.findall(r"dot_general .*\(tensor<[\dx]*xbf16>, tensor<[\dx]*xbf16>\)", text))


@pytest.mark.parametrize("sparse", [False, True])
def test_the_whole_forward_pass(config: LlamaConfig, sparse: bool) -> None:
    params, tokens = param_shapes(config, "bfloat16"), numbers(2, 64, dtype=jnp.int32)
    rules = rules_of(config) if sparse else None
    text, (out,) = lowered(lambda p, t, r: logits(config, p, t, rules=r), params, tokens, rules)
    # Seven linear layers and two products of attention a block, and the head, on the matrix units.
    assert bfloat16_products(text) == 2 * 9 + 1
    assert (out.shape, out.dtype) == ((2, 64, config.vocab_size), jnp.float32)


@pytest.mark.parametrize("sparse", [False, True])
def test_prefill_and_the_loop_of_tokens(config: LlamaConfig, sparse: bool) -> None:
    params, room, slots = param_shapes(config, "bfloat16"), 32, 96
    start, stops, real = (numbers(n, dtype=t) for n, t in ((1, jnp.int32), (2, jnp.int32), (1, jnp.bool)))
    values = jax.eval_shape(lambda: Sample().values(config.vocab_size))
    seeds = numbers(1, 3, dtype=jnp.uint32)
    prompt = numbers(1, 64, dtype=jnp.int32)
    first = lambda *args: prefill(config, slots, room, *args)  # noqa: E731
    arguments = params, prompt, start, values, seeds, stops, real
    lowered(first, *arguments)
    state, rules = jax.eval_shape(first, *arguments), rules_of(config) if sparse else None
    until = numbers(dtype=jnp.int32)
    text, _ = lowered(lambda *args: decode(config, *args, "xla"), params, state, until, start, values, stops, rules)
    assert "stablehlo.while" in text and bfloat16_products(text) >= 2 * 9 + 1


def test_the_loss_of_a_population(config: LlamaConfig) -> None:
    params = param_shapes(config, "bfloat16")
    gains = [{name: numbers(config.layer_shapes[name][0]) for name in LAYERS} for _ in range(2)]
    caches = jax.eval_shape(lambda: empty_cache(config, WINDOWS, 64, jnp.bfloat16))
    hidden = numbers(WINDOWS, SPARSE, config.hidden_size, dtype=jnp.bfloat16)
    candidates = tuple(numbers(2, CANDIDATES // 2, 2, 7) for _ in range(2))
    tokens = numbers(WINDOWS, SPARSE, dtype=jnp.int32)
    text, (out,) = lowered(
        lambda *args: _kl_of_candidates(config, 32, None, *args), params, gains, tokens, hidden, caches, candidates
    )
    assert (out.shape, out.dtype) == ((CANDIDATES,), jnp.float32) and bfloat16_products(text) >= 2 * 9 + 1
