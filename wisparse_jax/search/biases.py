"""Constant vectors in place of what is skipped, trained on KL to the dense model (as SPON, arXiv 2512.12744).

One bias per block linear, added only where the layer runs sparse. Thresholds stay as they are meanwhile. Calibration
text is short beside the number of biases, so windows that are held out say when to stop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from wisparse_jax.calibration.dense import Calibration
from wisparse_jax.calibration.sparse_run import Biases
from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.divergence import kl_divergence
from wisparse_jax.models.forward import Cache, Params, head, hidden_states, layout
from wisparse_jax.models.mesh import on_host
from wisparse_jax.models.rules import Rules
from wisparse_jax.sparsity.apply import with_biases

TOKENS_A_STEP = 1024
# Looks at the held-out windows without a better one before training stops.
PATIENCE = 3


def zero_biases(config: LlamaConfig) -> Biases:
    """Biases that change nothing."""
    return [{name: jnp.zeros(config.layer_shapes[name][1]) for name in LAYERS} for _ in range(config.num_blocks)]


def train_biases(
    training: Calibration,
    held_out: Calibration,
    rules: Rules,
    steps: int,
    every: int,
    learning_rate: float,
    seed: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[Biases, list[float]]:
    """The biases of least held-out KL that Adam meets, and that KL at the start and after every so many steps.

    Args:
        training: the dense run on the windows to learn from.
        held_out: the dense run, in the same basis, on the windows to stop by.
        rules: thresholds of the sparse model.
        steps: of Adam, at most.
        every: steps between two looks at the held-out windows.
        learning_rate: at the start; it falls to 0 by a cosine.
        seed: of the windows of each step.
        progress: around the numbers of the looks.
    """
    windows, positions = training.tokens.shape
    batch = max(1, min(windows, TOKENS_A_STEP // positions))
    biases = zero_biases(training.config)
    state = _optimiser(learning_rate, steps).init(biases)
    best, least = biases, _mean_divergence(held_out, rules, biases, batch)
    curve, stale = [least], 0
    rng = np.random.default_rng(seed)
    for look in progress(range(-(-steps // every))):
        if stale >= PATIENCE:
            continue
        for _ in range(min(every, steps - look * every)):
            rows = np.sort(rng.choice(windows, batch, replace=False))
            biases, state = _step(
                training.config, training.dense_positions, learning_rate, steps, training.params, rules, biases, state,
                jnp.asarray(rows), *_windows(training),
            )  # fmt: skip
        value = _mean_divergence(held_out, rules, biases, batch)
        curve.append(value)
        stale = 0 if value < least else stale + 1
        if value < least:
            best, least = biases, value
    return best, curve


def _optimiser(learning_rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))


def _windows(calibration: Calibration) -> tuple[Array, Array, Cache]:
    """Tokens, final hidden states and caches of all windows."""
    return calibration.tokens, calibration.hidden, calibration.caches


def _mean_divergence(calibration: Calibration, rules: Rules, biases: Biases, batch: int) -> float:
    """The mean KL over the windows, every window counted once."""
    config, first = calibration.config, calibration.dense_positions
    sums, count = 0.0, len(calibration.tokens)
    for at in range(0, count, batch):
        # The last batch is filled up with its own last window, which counts once.
        rows = np.minimum(np.arange(at, at + batch), count - 1)
        values = _divergence(
            config, first, calibration.params, rules, biases, jnp.asarray(rows), *_windows(calibration)
        )
        sums += float(np.sum(on_host(values).astype(np.float64)[: count - at]))
    return sums / count


@functools.partial(jax.jit, static_argnums=(0, 1))
def _divergence(
    config: LlamaConfig,
    first: int,
    params: Params,
    rules: Rules,
    biases: Biases,
    rows: Int[Array, " chosen"],
    tokens: Int[Array, "windows positions"],
    hidden: Float[Array, "windows positions hidden"],
    caches: Cache,
) -> Float[Array, " chosen"]:
    """The KL of the chosen windows."""
    tokens, hidden, caches = jax.tree.map(lambda a: a[rows], (tokens, hidden, caches))
    where = layout(config, tokens.shape[0], tokens.shape[1], first)
    out, _ = hidden_states(config, params, tokens, where, caches, with_biases(rules, biases), rematerialise=True)
    return jnp.mean(kl_divergence(head(params, hidden), head(params, out)), axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _step(
    config: LlamaConfig,
    first: int,
    learning_rate: float,
    steps: int,
    params: Params,
    rules: Rules,
    biases: Biases,
    state: Any,
    *windows: Any,
) -> tuple[Biases, Any]:
    gradient = jax.grad(lambda own: jnp.mean(_divergence(config, first, params, rules, own, *windows)))(biases)
    change, state = _optimiser(learning_rate, steps).update(gradient, state)
    return jax.tree.map(jnp.add, biases, change), state
