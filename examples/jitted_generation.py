"""Generation inside a jitted function of one's own: a dense prompt, then sparse tokens from a cache.

    python examples/jitted_generation.py

`wisparse_jax.generate` does the same with sampling, stops and batches of any length.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import wisparse_jax as ws
from wisparse_jax.inference import sample_windows
from wisparse_jax.models.forward import empty_cache, head, hidden_states, layout, token_logits


@functools.partial(jax.jit, static_argnums=2)
def write(model: Any, prompt: jax.Array, new: int) -> jax.Array:
    """`new` greedy tokens after a prompt, int32 [batch, length]; a sparse model is a pytree, so jit takes it."""
    config, params = model.config, model.params
    batch, length = prompt.shape
    start = jnp.zeros(batch, jnp.int32)
    cache = empty_cache(config, batch, length + new, params["embed"].dtype)
    hidden, cache = hidden_states(config, params, prompt, layout(config, batch, length), cache)
    first = jnp.argmax(head(params, hidden[:, -1]), axis=-1).astype(jnp.int32)

    def step(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens, last, cache = carry
        logits, cache = token_logits(config, params, last, length + i - 1, start, cache, model.rules)
        last = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return lax.dynamic_update_slice(tokens, last[:, None], (0, i)), last, cache

    tokens = jnp.zeros((batch, new), jnp.int32).at[:, 0].set(first)
    return lax.fori_loop(1, new, step, (tokens, first, cache))[0]


def main() -> None:
    """Write with the demo model at 50 % sparsity."""
    model, tokenizer = ws.load("demo", dtype="float32"), ws.load_tokenizer("demo")
    settings = ws.SearchSettings(tokens=512, statistics_tokens=256, held_out_share=0.0, compare_teal=False)
    windows = sample_windows(model, windows=8, length=64, seed=0)
    sparse = ws.apply(model, ws.calibrate(model, windows, sparsity=0.5, method="uniform", settings=settings))
    prompt = tokenizer.encode("The old lighthouse keeper opened the door and")
    tokens = write(sparse, jnp.asarray([prompt]), 24)[0].tolist()
    print(tokenizer.decode(tokens, after=prompt))
    # Later ones may differ: a channel within rounding of its threshold is kept by one and skipped by the other.
    assert tokens[:8] == ws.generate(sparse, [prompt], max_new_tokens=24)[0][:8]


if __name__ == "__main__":
    main()
