"""What a search costs before it runs: tokens forwarded, by docs/method.md, and roughly how long that takes here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wisparse_jax.calibration.settings import SearchSettings
from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.forward import BlockCache
from wisparse_jax.models.llama import Llama
from wisparse_jax.search.basis import GROUPS_A_STEP, TOKENS_A_STEP
from wisparse_jax.search.greedy_path import increments
from wisparse_jax.search.judge import held_out_windows
from wisparse_jax.search.progress import STARTS, trains
from wisparse_jax.search.training import forward_block, step_block
from wisparse_jax.sparsity.methods import Method

BACKWARD = 3  # a forward and a backward pass, in forward passes
SOLVE = 8  # Cayley's transform of a matrix, and back, in products of two such matrices
# A token that is sampled, 16 at a time, in tokens that are read together: SmolLM2-135M on two CPU cores.
SAMPLED = 5
# Tokens times weights, some ten seconds of two CPU cores: below, a measurement takes too much of the search's own time.
LEAST_WORK = 3e11
WORTH_SAYING = 60.0  # seconds


def search_tokens(config: LlamaConfig, method: Method, settings: SearchSettings, targets: int = 1) -> dict[str, float]:
    """Tokens through the model in each stage of a search for so many targets, or work as much as that.

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
        hidden = config.hidden_size
        # Forward and back: the samples times the basis, each group's gradients for skipped energy, and a solve.
        step = BACKWARD * GROUPS_A_STEP * TOKENS_A_STEP * hidden**2 + SOLVE * hidden**3
        skipping = BACKWARD * GROUPS_A_STEP * hidden**3
        found["basis"] = settings.absolute_steps * step + settings.skipped_steps * (step + skipping)
        found["basis"] /= _weights(config)
    if method.gains != "norms":
        found["gains"] = gradients
    if method.search_exponents:
        tries = len(LAYERS) * len(settings.exponents) * settings.exponent_passes
        found["exponents"] = found["final exponents"] = targets * tries * settings.exponent_tokens
    steps = np.ceil(settings.max_sparsity / increments(np.asarray(config.layer_weights, float), settings.layer_step))
    paths = len(LAYERS) * settings.layer_tokens * float(steps.sum())
    # Targets share the paths where they share the exponents.
    own = paths * (targets if method.search_exponents else 1)
    evolved = targets * settings.population * (settings.generations + 1) * settings.block_tokens
    by_allocator = {
        "greedy": own,
        "second-order": gradients,
        "evolution": own + evolved,
        "evolution-equal-layers": evolved,
        "paper": own + targets * settings.paper_offspring * settings.paper_generations * settings.block_tokens,
    }
    found["budgets"] = by_allocator.get(method.allocator, 0.0)  # uniform's, and of one that is not known here
    if trains(method) and held:
        looks = settings.training_steps / settings.training_every * judged
        found["training"] = targets * (BACKWARD * settings.training_steps * settings.training_tokens + looks)
    found["thresholds"] = targets * text
    if held:
        # Each judgement is of two models, and the dense one runs with them.
        times = (method.basis != "none") + (method.gains != "norms")
        each = (method.allocator in STARTS) + 2 * method.search_exponents
        found["held out"] = 4 * judged * (times + targets * each)
        greedy = method.allocator in ("greedy", "evolution") and not method.search_exponents
        found["comparison"] = targets * 4 * judged + (paths if settings.compare_teal and not greedy else 0.0)
    return {stage: float(tokens) for stage, tokens in found.items()}


class Speed(NamedTuple):
    """Seconds for a token of a window through the dense model, once compiled, and for as much work in training."""

    forward: float
    training: float

    def seconds(self, stages: dict[str, float]) -> float:
        """For the tokens of stages."""
        return sum(count * (self.training if name == "training" else self.forward) for name, count in stages.items())


def measured_speed(model: Llama) -> Speed:
    """How fast the model is on the devices that hold it; training by a step of one block."""
    forward = seconds_per_token(model)
    return Speed(forward, training_seconds(model, forward))


def seconds_per_token(model: Llama) -> float:
    """How long the dense model takes for a token of a window, once compiled."""
    length = min(512, model.config.context)
    tokens = np.arange(length, dtype=np.int32)[None] % model.config.vocab_size
    return _timed(lambda: model(tokens)) / length


def training_seconds(model: Llama, forward: float) -> float:
    """How long a step of training takes for each of the tokens forwarded that it is counted as.

    One block is timed, where the choice of channels, quantiles and sigmoids, takes as long on a CPU as the products;
    `forward` are the seconds of a token through the model, of which the head takes its share.
    """
    config, weights = model.config, model.params["blocks"][0]
    windows, length = 4, min(512, config.context)
    positions = max(1, length // 2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(windows, positions, config.hidden_size)), model.dtype)
    slots = (windows, length, config.num_kv_heads, config.head_dim)
    cache = BlockCache(jnp.zeros(slots, model.dtype), jnp.zeros(slots, model.dtype))
    own = {
        part: {name: jnp.zeros(shape[axis]) for name, shape in config.layer_shapes.items()}
        for part, axis in (("gains", 0), ("biases", 1))
    }
    state = optax.scale_by_adam().init(own)
    table, rates = jnp.full(len(LAYERS), 0.5), dict.fromkeys(own, jnp.float32(0.0))
    where = config, config.windows[0], length - positions, weights, x, cache, own

    def step() -> Any:
        return forward_block(*where, table), step_block(*where, state, table, x, rates)

    head = forward * config.vocab_size * config.hidden_size / _weights(config)
    return _timed(step) * config.num_blocks / (BACKWARD * windows * positions) + head


def _timed(run: Callable[[], Any]) -> float:
    """Seconds of a call, the better of two after one that compiles."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return min(times[1:])


def forecast(
    model: Llama, methods: Sequence[Method], settings: SearchSettings, targets: int = 1, sampled: int = 0, read: int = 0
) -> str | None:
    """A line about how long searches will take on this device; None where that is below about a minute.

    Args:
        model: the dense model, whose speed is measured where there is enough to do.
        methods: those that search, one after another, each for all targets.
        settings: of every search.
        targets: how many sparsities.
        sampled: tokens of text that the model writes first.
        read: tokens forwarded besides, to measure plans.
    """
    searches = [search_tokens(model.config, method, settings, targets) for method in methods]
    tokens = sum(sum(stages.values()) for stages in searches) + read
    # What several processes measure differs, and all must run the same programs.
    if tokens * _weights(model.config) < LEAST_WORK or jax.process_count() > 1:
        return None
    forward = seconds_per_token(model)
    if (tokens + SAMPLED * sampled) * forward < WORTH_SAYING / 2:
        return None
    trained = any("training" in stages for stages in searches)
    speed = Speed(forward, training_seconds(model, forward) if trained else forward)
    seconds = sum(map(speed.seconds, searches)) + (read + SAMPLED * sampled) * forward
    if seconds < WORTH_SAYING:
        return None
    return f"about {duration(seconds)} on this device, compiling aside ({rounded(tokens)} tokens forwarded)"


def rounded(number: float) -> str:
    """Two digits of it, such as 380 thousand."""
    for size, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{float(f'{number / size:.2g}'):g} {name}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """A time as exactly as an estimate is: 9 minutes, 20 minutes, 46 hours."""
    for unit, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{_few_digits(seconds / unit)} {name}"
    return f"{_few_digits(seconds)} seconds"


def _few_digits(number: float) -> str:
    """Whole up to ten, in fives above."""
    return f"{number:.0f}" if number < 10 else f"{5 * round(number / 5)}"


def _weights(config: LlamaConfig) -> int:
    """Weights that a token is multiplied with."""
    return config.num_blocks * sum(config.layer_weights) + config.vocab_size * config.hidden_size
