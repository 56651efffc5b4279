"""What a search costs before it runs: tokens forwarded, by docs/method.md, and roughly how long that takes here."""

from __future__ import annotations

import time

import jax
import numpy as np

from wisparse_jax.calibration.settings import SearchSettings
from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.llama import Llama
from wisparse_jax.search.basis import GROUPS_A_STEP, TOKENS_A_STEP
from wisparse_jax.search.greedy_path import increments
from wisparse_jax.search.judge import held_out_windows
from wisparse_jax.search.progress import STARTS, trains
from wisparse_jax.sparsity.methods import Method

BACKWARD = 3  # a forward and a backward pass, in forward passes


def search_tokens(config: LlamaConfig, method: Method, settings: SearchSettings) -> dict[str, float]:
    """Tokens through the model in each stage of a search for one target, or work as much as that.

    A block's share of the model is counted as that share of a token; stages may stop early, so that these are the most.
    """
    window = min(settings.window, config.context)
    count = -(-settings.tokens // window)
    held = held_out_windows(count, settings)
    text, judged, gradients = count * window, held * window, BACKWARD * settings.gradient_tokens
    found: dict[str, float] = {"statistics": text}
    if method.basis != "none":
        found["statistics"] += text
        found["moments"] = text + gradients
    if method.basis == "refined":
        steps, hidden = settings.absolute_steps + settings.skipped_steps, config.hidden_size
        # Products of the samples with the basis, forward and back, and the solves of Cayley's transform.
        products = BACKWARD * GROUPS_A_STEP * TOKENS_A_STEP * hidden**2 + 4 * hidden**3
        found["basis"] = steps * products / _weights(config)
    if method.gains != "norms":
        found["gains"] = gradients
    if method.search_exponents:
        tries = len(LAYERS) * len(settings.exponents) * settings.exponent_passes
        found["exponents"] = found["final exponents"] = tries * settings.exponent_tokens
    steps = np.ceil(settings.max_sparsity / increments(np.asarray(config.layer_weights, float), settings.layer_step))
    paths = len(LAYERS) * settings.layer_tokens * float(steps.sum())
    found["budgets"] = {
        "uniform": 0.0,
        "greedy": paths,
        "second-order": gradients,
        "evolution": paths + settings.population * (settings.generations + 1) * settings.block_tokens,
        "paper": paths + settings.paper_offspring * settings.paper_generations * settings.block_tokens,
    }[method.allocator]
    if trains(method) and held:
        looks = settings.training_steps / settings.training_every * judged
        found["training"] = BACKWARD * settings.training_steps * settings.training_tokens + looks
    found["thresholds"] = text
    if held:
        # Each judgement is of two models, and the dense one runs with them.
        times = (method.basis != "none") + (method.gains != "norms") + (method.allocator in STARTS)
        found["held out"] = 4 * judged * (times + 2 * method.search_exponents)
        greedy = method.allocator in ("greedy", "evolution") and not method.search_exponents
        found["comparison"] = 4 * judged + (paths if settings.compare_teal and not greedy else 0.0)
    return {stage: float(tokens) for stage, tokens in found.items()}


def seconds_per_token(model: Llama) -> float:
    """How long the dense model takes for a token of a window, once compiled."""
    length = min(512, model.config.context)
    tokens = np.arange(length, dtype=np.int32)[None] % model.config.vocab_size
    times = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(model(tokens))
        times.append(time.perf_counter() - began)
    return min(times[1:]) / length


def _weights(config: LlamaConfig) -> int:
    """Weights that a token is multiplied with."""
    return config.num_blocks * sum(config.layer_weights) + config.vocab_size * config.hidden_size
