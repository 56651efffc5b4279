"""Tokens per second of decoding, dense and sparse, in the same run; on a GPU.

    python scripts/benchmark_decode.py --shape llama-3.1-8b --sparsity 0.5 --batch 1 --context 512

Random weights at true shapes (configs/SHAPE.json); each layer's threshold is a quantile of the inputs that those
weights produce while decoding, so that every layer really skips its share. `--model PATH --plan PLAN` takes a real
model instead. The cache is filled with random keys and values. The token loop is the one that `generate` runs.

Each step is compared with the best dense one in the same weights and with the best one in the weights as stored, both
of the same run. Dense steps are: of the weights as stored those with the weights of one input joined and products by
XLA, with XLA's attention and with ours; and of all weights our own kernel, where it runs, with thresholds of 0.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from decode_table import add_ratios, report
from dense_step import dense_logits, fused
from device_time import PEAK_BANDWIDTH, measure
from random_model import CALIBRATION_STEPS, CONFIGS, calibrated, random_cache, random_params

from kernels_pallas.weight import Weight
from wisparse_jax.inference import GREEDY
from wisparse_jax.inference.loop import LoopState, NextLogits, decode_implementation, token_loop
from wisparse_jax.models.config import INPUT_GROUPS, LAYERS, LlamaConfig, read_config
from wisparse_jax.models.decode import Record, group_thresholds, kernel_token_logits, zero_thresholds
from wisparse_jax.models.forward import Cache, Params
from wisparse_jax.models.quantise import quantise_params
from wisparse_jax.models.rules import Thresholds, merge_biases, rules_of, thresholds_of
from wisparse_jax.sparsity import SparsityPlan, load_sparse

PROFILED = 16  # tokens of the run under the profiler


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time decoding."""

    shape: str = "llama-3.1-8b"  # a file of configs/
    model: str | None = None  # a real model instead, with its plan
    plan: Path | None = None
    sparsity: tuple[float, ...] = (0.5,)
    batch: tuple[int, ...] = (1,)
    context: tuple[int, ...] = (512,)
    dtype: str = "bfloat16"
    implementation: tuple[Literal["triton", "mosaic"], ...] = ()  # of the sparse runs; by default the faster one
    weights: tuple[Literal["stored", "int8", "int4"], ...] = ("stored",)  # kinds of weights, one after the other
    head: tuple[Literal["stored", "int8"], ...] = ("stored",)  # each with every kind of weights
    tokens: int = 96
    repeats: int = 5
    blocks: int | None = None  # fewer than the shape has, for a quick look
    profile: bool = True
    json: bool = False  # one JSON object and nothing else


def main() -> None:
    """Run every combination and print a table."""
    args = tyro.cli(Arguments, description=__doc__)
    if jax.default_backend() != "gpu":
        sys.exit("benchmark_decode: needs an NVIDIA GPU")
    thresholds: Thresholds | None = None
    if args.model is not None:
        if args.plan is None:
            sys.exit("benchmark_decode: --model needs --plan")
        sparse = load_sparse(args.model, SparsityPlan.load(args.plan), args.dtype)
        config, params = sparse.config, merge_biases(sparse.params, sparse.rules)
        thresholds = thresholds_of(sparse.rules)
    else:
        config = read_config(CONFIGS / f"{args.shape}.json")
        if args.blocks is not None:
            config = dataclasses.replace(config, num_blocks=args.blocks, windows=config.windows[: args.blocks])
        params = random_params(config, args.dtype)
    runs = []
    for context in args.context:
        for batch in args.batch:
            runs += compare(args, config, params, context, batch, thresholds)
    device = jax.devices()[0].device_kind
    if args.json:
        print(json.dumps({"device": device, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d"), "runs": runs}))
    else:
        name = f"{args.model or args.shape}, {args.dtype}, {device}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}"
        print(report(f"{name}; median of {args.repeats} runs of {args.tokens} tokens", runs))


def compare(
    args: Arguments, config: LlamaConfig, params: Params, context: int, batch: int, given: Thresholds | None
) -> list[dict[str, Any]]:
    """The dense runs and the sparse ones at one batch and context."""
    cache = random_cache(config, batch, context + args.tokens + 8, params["embed"].dtype)
    joined = fused(params)
    runs = [
        Run("dense, XLA", "stored", "dense", None, params, joined),
        Run("dense, XLA products, our attention", "stored", "dense, own attention", None, params, joined),
    ]
    found = {s: given or calibrated(config, params, cache, context, batch, s) for s in args.sparsity}
    for kind, own in stored_kinds(args, params).items():
        named = "" if kind == "stored" else f", {kind}"
        if decode_implementation(config, own, None, batch) == "mosaic":
            zeros = zero_thresholds(config)
            runs.append(Run(f"dense, mosaic{named}", kind, "mosaic", None, own, zeros))
        for sparsity, thresholds in found.items():
            best = "triton" if batch > 1 else decode_implementation(config, own, rules_of(thresholds), 1)
            for how in args.implementation or (best,):
                name = f"sparse, {how}, {sparsity:.0%}{named}"
                runs.append(Run(name, kind, how, thresholds, own, group_thresholds(thresholds)))
    programs = compiled(config, runs, args.tokens, cache, context, batch)
    out = []
    for name, stored, kind, thresholds, own, weights in runs:
        program = programs[kind, stored]

        def run(tokens: int, program: Any = program, own: Params = own, weights: Any = weights) -> LoopState:
            state = first_state(cache, args.tokens, context, batch)
            run.started = time.perf_counter()  # type: ignore[attr-defined]
            return program(own, weights, state, jnp.int32(tokens + 1))

        run(args.tokens)
        seconds = sorted(timed(run, args.tokens) for _ in range(args.repeats))[args.repeats // 2] / args.tokens
        row: dict[str, Any] = {"run": name, "weights": stored, "batch": batch, "context": context, "ms": seconds * 1e3}
        row["tokens_per_second"] = batch / seconds
        read = weight_bytes(config, own, 1.0)
        if thresholds is not None:
            layers = realised(config, kind, own, cache, context, batch, weights)
            row["realised"] = {n: float(layers[:, i].mean()) for i, n in enumerate(LAYERS)}
            row["realised_min_max"] = [float(layers.min()), float(layers.max())]
            share = np.asarray(config.layer_weights) / sum(config.layer_weights)
            row["sparsity"] = float((layers @ share).mean())
            read = weight_bytes(config, own, 1 - row["sparsity"])
        width = jnp.dtype(params["embed"].dtype).itemsize
        read += 2 * batch * context * config.num_kv_heads * config.head_dim * width * config.num_blocks
        row["bytes"] = read
        peak = PEAK_BANDWIDTH.get(jax.devices()[0].device_kind)
        row["roofline"] = None if peak is None else read / peak / seconds
        if args.profile:
            row["profile"] = kernels(measure(lambda run=run: run(PROFILED)), config, PROFILED)
        out.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "profile"}), file=sys.stderr, flush=True)
    add_ratios(out)
    return out


def stored_kinds(args: Arguments, params: Params) -> dict[str, Params]:
    """The parameters with each kind of weights and of head."""
    made = {}
    for kind in args.weights:
        own = params if kind == "stored" else quantise_params(params, kind)
        for head in args.head:
            if head == "int8":
                own = quantise_params(own, None, head)
            made[kind if head == "stored" else f"{kind}, int8 head"] = own
    return made


class Run(NamedTuple):
    """One row of the table."""

    name: str
    stored: str  # the kind of weights
    kind: str  # "dense", "dense, own attention", or the implementation of the sparse step
    thresholds: Thresholds | None
    params: Params
    weights: Any  # the joined weights of XLA's dense step, the grouped thresholds of any other


def step_of(config: LlamaConfig, kind: str, params: Params, weights: Any) -> NextLogits:
    """The step of one kind of run."""
    if kind.startswith("dense"):
        return functools.partial(dense_logits, config, kind != "dense", params, weights)
    return functools.partial(kernel_token_logits, config, params, thresholds=weights, implementation=kind)


def compiled(
    config: LlamaConfig, runs: list[Run], tokens: int, cache: Cache, context: int, batch: int
) -> dict[tuple[str, str], Callable[..., LoopState]]:
    """The library's own token loop around each kind of step, all compiled at once."""
    start, stops = jnp.zeros(batch, jnp.int32), jnp.full(1, -2, jnp.int32)
    values = GREEDY.values(config.vocab_size)

    def lower(run: Run) -> jax.stages.Lowered:
        @functools.partial(jax.jit, donate_argnums=2)
        def decode(params: Params, weights: Any, state: LoopState, until: jax.Array) -> LoopState:
            return token_loop(step_of(config, run.kind, params, weights), state, until, start, values, stops)

        return decode.lower(run.params, run.weights, first_state(cache, tokens, context, batch), jnp.int32(0))

    lowered = {key: lower(run) for key, run in {(run.kind, run.stored): run for run in runs}.items()}
    with ThreadPoolExecutor() as pool:
        return dict(zip(lowered, pool.map(lambda one: one.compile(), lowered.values()), strict=True))


def first_state(cache: Cache, tokens: int, context: int, batch: int) -> LoopState:
    """Room for some tokens after a copy of the cache."""
    first = jnp.arange(5, 5 + batch, dtype=jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(batch))
    room, finished = jnp.full((batch, tokens + 1), -1, jnp.int32), jnp.zeros(batch, bool)
    fresh = jax.tree.map(jnp.copy, cache)
    return jax.block_until_ready(LoopState(jnp.int32(1), jnp.int32(context), room, first, finished, keys, fresh))


def timed(run: Callable[[int], LoopState], tokens: int) -> float:
    """Seconds of the token loop alone, without the copy of the cache."""
    state = run(tokens)
    jax.block_until_ready(state.tokens)
    return time.perf_counter() - run.started  # type: ignore[attr-defined]


def realised(
    config: LlamaConfig, kind: str, params: Params, cache: Cache, context: int, batch: int, grouped: Any
) -> np.ndarray:
    """Share of channels that no sequence kept, per block and layer, replaying the timed run's first tokens."""
    step = counting_step(config, kind, batch)
    tokens, state, counts = jnp.arange(5, 5 + batch, dtype=jnp.int32), cache, []
    for i in range(CALIBRATION_STEPS):
        tokens, state, kept = step(params, tokens, jnp.int32(context + i), state, grouped)
        counts.append(np.asarray(kept))
    return 1 - np.mean(counts, axis=0) / np.array([config.layer_shapes[n][0] for n in LAYERS])


@functools.cache
def counting_step(config: LlamaConfig, kind: str, batch: int) -> Callable[..., Any]:
    """The sparse step that also returns how many channels each layer of each block kept."""
    start = jnp.zeros(batch, jnp.int32)

    @jax.jit
    def step(params: Params, tokens: jax.Array, slot: jax.Array, cache: Cache, grouped: Any) -> Any:
        records: list[Record] = []
        logits, cache = kernel_token_logits(config, params, tokens, slot, start, cache, grouped, kind, records=records)
        kept = [jnp.concatenate([r[g].sum(1) for g in INPUT_GROUPS]) for r in records]
        return jnp.argmax(logits, -1).astype(jnp.int32), cache, jnp.stack(kept)

    return step


def weight_bytes(config: LlamaConfig, params: Params, kept: float) -> float:
    """Bytes of weights that one step reads: the kept rows of the block linears, and the whole head."""
    blocks = sum(Weight.of(block[name]).nbytes for block in params["blocks"] for name in LAYERS)
    return blocks * kept + sum(a.nbytes for a in jax.tree.leaves(params.get("lm_head", params["embed"])))


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


if __name__ == "__main__":
    main()
