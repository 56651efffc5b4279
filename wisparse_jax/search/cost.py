"""What a search costs before it runs: tokens forwarded, by docs/method.md, and roughly how long that takes here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.forward import BlockCache
from wisparse_jax.models.model import Model
from wisparse_jax.search.forecast import KINDS, Part
from wisparse_jax.search.judge import held_out_windows
from wisparse_jax.search.methods import Choice, resolve
from wisparse_jax.search.problem import BACKWARD
from wisparse_jax.search.settings import SearchSettings
from wisparse_jax.search.stages.base import Size, weights_a_token
from wisparse_jax.search.training import forward_block, step_block

# A token that is sampled, 16 at a time, in tokens that are read together: SmolLM2-135M on two CPU cores.
SAMPLED = 5
# Tokens times weights, some ten seconds of two CPU cores: below, a measurement takes too much of the search's own time.
LEAST_WORK = 3e11
WORTH_SAYING = 60.0  # seconds


def search_tokens(config: LlamaConfig, method: Choice, settings: SearchSettings, targets: int = 1) -> dict[str, float]:
    """Tokens through the model in each stage of a search for so many targets, or work as much as that.

    A block's share of the model is counted as that share of a token; stages may stop early, so that these are the most.
    """
    found: dict[str, float] = {}
    for part in search_parts(config, method, settings, targets):
        found[part.name] = found.get(part.name, 0.0) + part.tokens
    return found


def search_parts(config: LlamaConfig, method: Choice, settings: SearchSettings, targets: int = 1) -> list[Part]:
    """The rows of the time table that a search enters, with what each takes."""
    window = min(settings.window, config.context)
    count = -(-settings.tokens // window)
    stages = tuple(stage.configured(settings) for stage in resolve(method, settings).all_stages)
    return expected(Size(config, count * window, held_out_windows(count, settings) * window, stages), targets)


def expected(size: Size, targets: int) -> list[Part]:
    """The rows of the time table that a search enters, as often as it does unless a stage is dropped.

    What is done once for all targets belongs to the first of them.
    """
    shared = [part for stage in size.stages if stage.shared for part in stage.parts(size)]
    own = [part for stage in size.stages if not stage.shared for part in stage.parts(size)]
    first = [part._replace(tokens=part.tokens + part.once, once=0.0) for part in own]
    # The programs are there by then.
    other = [part._replace(once=0.0, programs=0) for part in own]
    return shared + first + other * (targets - 1)


class Speed(NamedTuple):
    """Seconds for a token of a window through the dense model, once compiled, and for as much work in training."""

    forward: float
    training: float

    @property
    def rates(self) -> dict[str, float]:
        """Seconds of a token of each kind of work."""
        return {kind: factor * self.forward for kind, factor in KINDS.items()} | {"training": self.training}

    def seconds(self, parts: Sequence[Part]) -> float:
        """For all that searches do."""
        return sum(part.tokens * self.rates[part.kind] for part in parts)


def measured_speed(model: Model, trained: bool = True) -> Speed:
    """How fast the model is on the devices that hold it; training by a step of one block, if it is trained."""
    forward = seconds_per_token(model)
    return Speed(forward, training_seconds(model, forward) if trained else KINDS["training"] * forward)


def worth_measuring(config: LlamaConfig, tokens: float) -> bool:
    """Whether so many tokens take long enough that the model's speed is measured first."""
    # What several processes measure differs, and all must run the same programs.
    return tokens * weights_a_token(config) >= LEAST_WORK and jax.process_count() == 1


def measured_rates(model: Model, parts: Sequence[Part]) -> dict[str, float] | None:
    """The rates for a search, measured where there is enough to do; see `Forecast`."""
    if not worth_measuring(model.config, sum(part.tokens for part in parts)):
        return None
    return measured_speed(model, any(part.kind == "training" for part in parts)).rates


def seconds_per_token(model: Model) -> float:
    """How long the dense model takes for a token of a window, once compiled."""
    length = min(512, model.config.context)
    tokens = np.arange(length, dtype=np.int32)[None] % model.config.vocab_size
    return _timed(lambda: model(tokens)) / length


def training_seconds(model: Model, forward: float) -> float:
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

    head = forward * config.vocab_size * config.hidden_size / weights_a_token(config)
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
    model: Model, methods: Sequence[Choice], settings: SearchSettings, targets: int = 1, sampled: int = 0, read: int = 0
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
    parts = [part for method in methods for part in search_parts(model.config, method, settings, targets)]
    tokens = sum(part.tokens for part in parts) + read
    if not worth_measuring(model.config, tokens):
        return None
    forward = seconds_per_token(model)
    if (tokens + SAMPLED * sampled) * forward < WORTH_SAYING / 2:
        return None
    trained = any(part.kind == "training" for part in parts)
    speed = Speed(forward, training_seconds(model, forward) if trained else forward)
    seconds = speed.seconds(parts) + (read + SAMPLED * sampled) * forward
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
