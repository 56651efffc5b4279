"""Tokens per second of decoding, dense and sparse, in the same run.

Each step is compared with the best dense one in the same weights and with the best one in the weights as stored, both
of the same run. Dense steps are: of weights as stored those with the weights of one input joined and products by XLA,
on a GPU with XLA's attention and with ours; and of all weights our own kernel with thresholds of 0 or, where it does
not run, the plain step. The token loop is the one that `generate` runs; the cache is filled with random numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from wisparse_jax.benchmark.cost import step_bytes
from wisparse_jax.benchmark.dense_step import dense_logits, fused
from wisparse_jax.benchmark.device_time import PEAK_BANDWIDTH, measure
from wisparse_jax.benchmark.random_model import calibrated, random_cache, with_biases
from wisparse_jax.benchmark.realised import realised
from wisparse_jax.benchmark.table import add_ratios
from wisparse_jax.inference import GREEDY
from wisparse_jax.inference.loop import LoopState, token_loop
from wisparse_jax.inference.steps import ControlledLogits, NextLogits, decode_implementation, kernel_step, masked_step
from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.control import Control
from wisparse_jax.models.decode import group_thresholds, kernel_token_logits, zero_thresholds
from wisparse_jax.models.formats import block_format, is_rounded
from wisparse_jax.models.forward import Cache, Params, token_logits
from wisparse_jax.models.quantise import quantise_params
from wisparse_jax.models.rules import Thresholds, rules_of
from wisparse_jax.models.widen import widen

PROFILED = 16  # tokens of the run under the profiler


@dataclasses.dataclass(frozen=True)
class Options:
    """What is timed; every combination of sparsity, weights, head, batch and context."""

    sparsity: tuple[float, ...] = (0.5,)  # of thresholds that are found while decoding, where none are given
    batch: tuple[int, ...] = (1,)
    context: tuple[int, ...] = (512,)
    weights: tuple[str, ...] = ("stored",)  # "stored", or a format to round to
    head: tuple[str, ...] = ("stored",)  # likewise; each with every kind of weights
    biases: bool = False  # every kind also with biases in all layers, as a plan's trained ones
    implementation: tuple[str, ...] = ()  # of the sparse steps; by default the faster one
    tokens: int = 96
    repeats: int = 5
    profile: bool = True  # where the time goes, on a GPU


def benchmark(
    config: LlamaConfig,
    params: Params,
    options: Options,
    thresholds: Thresholds | None = None,
    shares: Float64[np.ndarray, "blocks 7 *planes"] | None = None,
) -> list[dict[str, Any]]:
    """Time every combination: a record for each run, as `table.report` prints them.

    Args:
        config: of the model.
        params: its weights.
        options: what to time.
        thresholds: of a plan; without, each layer's threshold is a quantile of what it reads while decoding, so that
            every layer really skips its share.
        shares: that each layer, or each of its planes, does not read, in place of `options.sparsity`; of planes only
            with weights of that format.
    """
    runs = []
    for context in options.context:
        for batch in options.batch:
            runs += compare(options, config, params, context, batch, thresholds, shares)
    return runs


def compare(
    options: Options,
    config: LlamaConfig,
    params: Params,
    context: int,
    batch: int,
    given: Thresholds | None,
    shares: Float64[np.ndarray, "blocks 7 *planes"] | None,
) -> list[dict[str, Any]]:
    """The dense runs and the sparse ones at one batch and context."""
    on_gpu = jax.default_backend() == "gpu"
    cache = random_cache(config, batch, context + options.tokens + 8, params["embed"].dtype)
    runs = []
    if not is_rounded(params):
        joined = fused(params)
        runs.append(Run("dense, XLA", "stored", "dense", None, params, joined))
        if on_gpu:
            name = "dense, XLA products, our attention"
            runs.append(Run(name, "stored", "dense, own attention", None, params, joined))
    stored = stored_kinds(options, params)
    if given is not None:
        found = {"plan": given}
    elif shares is not None:
        # Thresholds of planes act on weights in planes.
        weights = next(iter(stored.values())) if shares.ndim == 3 else params
        found = {"plan": calibrated(config, weights, cache, context, batch, shares)}
    else:
        found = {f"{s:.0%}": calibrated(config, params, cache, context, batch, s) for s in options.sparsity}
    for kind, own in stored.items():
        named = "" if kind == "stored" else f", {kind}"
        if jax.default_backend() == "cpu" and is_rounded(own) and len(block_format(own).planes) == 1:
            own, named = widen(own), f"{named} widened"  # as `generate` does
        if decode_implementation(config, own, None, batch) == "mosaic":
            zeros = zero_thresholds(config, len(block_format(own).planes))
            runs.append(Run(f"dense, mosaic{named}", kind, "mosaic", None, own, zeros))
        elif kind != "stored" or is_rounded(params):
            runs.append(Run(f"dense, XLA{named}", kind, "xla", None, own, None))
        for name, thresholds in found.items():
            best = "triton" if on_gpu and batch > 1 else decode_implementation(config, own, rules_of(thresholds), batch)
            for how in options.implementation or (best,):
                weights = thresholds if how == "xla" else group_thresholds(thresholds, len(block_format(own).planes))
                runs.append(Run(f"sparse, {how}, {name}{named}", kind, how, thresholds, own, weights))
    programs = compiled(config, runs, options.tokens, cache, context, batch)
    out = []
    for name, kind_of_weights, kind, thresholds, own, weights in runs:
        program = programs[kind, kind_of_weights, thresholds is None]

        def run(
            tokens: int,
            program: Any = program,
            own: Params = own,
            weights: Any = weights,
            sparse: bool = thresholds is not None,
        ) -> LoopState:
            state = first_state(cache, options.tokens, context, batch, config.vocab_size, sparse)
            run.started = time.perf_counter()  # type: ignore[attr-defined]
            return program(own, weights, state, jnp.int32(tokens + 1))

        run(options.tokens)
        times = sorted(timed(run, options.tokens) for _ in range(options.repeats))
        seconds = times[options.repeats // 2] / options.tokens
        row: dict[str, Any] = {
            "run": name,
            "weights": kind_of_weights,
            "batch": batch,
            "context": context,
            "ms": seconds * 1e3,
        }
        row["tokens_per_second"] = batch / seconds
        kept = 1.0
        if thresholds is not None:
            layers = realised(config, kind, own, cache, context, batch, weights)
            row["realised"] = {n: float(layers[:, i].mean()) for i, n in enumerate(LAYERS)}
            row["realised_min_max"] = [float(layers.min()), float(layers.max())]
            share = np.asarray(config.layer_weights) / sum(config.layer_weights)
            row["sparsity"] = float((layers @ share).mean())
            kept = 1.0 if kind == "xla" else 1 - row["sparsity"]  # masked products read every row
        row["bytes"] = step_bytes(config, own, kept, context, batch)
        peak = PEAK_BANDWIDTH.get(jax.devices()[0].device_kind)
        row["roofline"] = None if peak is None else row["bytes"] / peak / seconds
        if options.profile and on_gpu:
            row["profile"] = kernels(measure(lambda run=run: run(PROFILED)), config, PROFILED)
        out.append(row)
        speed = f"{row['tokens_per_second']:.1f} tok/s, {row['ms']:.3f} ms a step"
        print(f"{name}, batch {batch}, context {context}: {speed}", file=sys.stderr, flush=True)
    add_ratios(out)
    return out


def stored_kinds(options: Options, params: Params) -> dict[str, Params]:
    """The parameters with each kind of weights and of head."""
    made = {}
    for kind in options.weights:
        own = params if kind == "stored" else quantise_params(params, kind)
        for head_kind in options.head:
            if head_kind == "stored":
                made[kind] = own
            else:
                made[f"{kind}, {head_kind} head"] = quantise_params(own, None, head_kind)
    if options.biases:
        made |= {f"{name}, biases": with_biases(own) for name, own in made.items()}
    return made


class Run(NamedTuple):
    """One row of the table."""

    name: str
    stored: str  # the kind of weights
    kind: str  # "dense", "dense, own attention", or the implementation of the step
    thresholds: Thresholds | None
    params: Params
    weights: (
        Any  # the joined weights of the dense step, or thresholds: grouped for the kernels, None for the plain step
    )


def step_of(config: LlamaConfig, run: Run, params: Params, weights: Any) -> NextLogits | ControlledLogits:
    """The step of one kind of run; a sparse one counts what it skips and scales thresholds, as in `generate`."""
    if run.kind.startswith("dense"):
        return functools.partial(dense_logits, config, run.kind != "dense", params, weights)
    if run.kind == "xla":
        if weights is None:
            return functools.partial(token_logits, config, params, rules=None)
        return masked_step(config, params, rules_of(weights))
    if run.thresholds is None:
        return functools.partial(kernel_token_logits, config, params, thresholds=weights, implementation=run.kind)
    return kernel_step(config, params, weights, implementation=run.kind)


def compiled(
    config: LlamaConfig, runs: list[Run], tokens: int, cache: Cache, context: int, batch: int
) -> dict[tuple[str, str, bool], Callable[..., LoopState]]:
    """The library's own token loop around each kind of step, all compiled at once."""
    start, stops = jnp.zeros(batch, jnp.int32), jnp.full(1, -2, jnp.int32)
    values = GREEDY.values(config.vocab_size)

    def lower(run: Run) -> jax.stages.Lowered:
        @functools.partial(jax.jit, donate_argnums=2)
        def decode(params: Params, weights: Any, state: LoopState, until: jax.Array) -> LoopState:
            return token_loop(step_of(config, run, params, weights), state, until, start, values, stops)

        state = first_state(cache, tokens, context, batch, config.vocab_size, run.thresholds is not None)
        return decode.lower(run.params, run.weights, state, jnp.int32(0))

    lowered = {
        key: lower(run) for key, run in {(run.kind, run.stored, run.thresholds is None): run for run in runs}.items()
    }
    with ThreadPoolExecutor() as pool:
        return dict(zip(lowered, pool.map(lambda one: one.compile(), lowered.values()), strict=True))


def first_state(
    cache: Cache, tokens: int, context: int, batch: int, vocab_size: int, sparse: bool = False
) -> LoopState:
    """Room for some tokens after a copy of the cache; of a sparse run with factors, which stay 1 here."""
    first = jnp.arange(5, 5 + batch, dtype=jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(batch))
    room, finished = jnp.full((batch, tokens + 1), -1, jnp.int32), jnp.zeros(batch, bool)
    fresh, seen = jax.tree.map(jnp.copy, cache), jnp.zeros((batch, vocab_size), bool)
    control = Control.start(0.0, False, batch) if sparse else None
    state = LoopState(jnp.int32(1), jnp.int32(context), room, first, finished, keys, fresh, seen, control)
    return jax.block_until_ready(state)


def timed(run: Callable[[int], LoopState], tokens: int) -> float:
    """Seconds of the token loop alone, without the copy of the cache."""
    state = run(tokens)
    jax.block_until_ready(state.tokens)
    return time.perf_counter() - run.started  # type: ignore[attr-defined]


def kernels(spent: dict[str, list[float]], config: LlamaConfig, tokens: int) -> dict[str, Any]:
    """Launches and microseconds per token by kernel, and what each block spends in and outside its products."""
    rows = {
        name: {"launches": len(times) / tokens, "us": sum(times) / tokens * 1e6}
        for name, times in spent.items()
        if not name.startswith("Memcpy")  # the loop's own start, a copy of the cache
    }
    top = dict(sorted(rows.items(), key=lambda item: -item[1]["us"])[:14])
    per_block = 1e6 / tokens / config.num_blocks

    def of(kernel: str) -> float:
        return sum(sum(t) for name, t in spent.items() if kernel in name) * per_block

    return {
        "busy_us": sum(row["us"] for row in rows.values()),
        "launches": sum(row["launches"] for row in rows.values()),
        "product_us_per_block": of("sparse_product"),
        "fused_us_per_block": of("fused_block"),
        "attention_us_per_block": of("decode_attention"),
        "kernels": top,
    }
