"""Tokens per second of decoding on a mesh and on one of its devices, in the same run; on NVIDIA GPUs.

    python scripts/benchmark_mesh.py --shape llama-3.1-8b --mesh model=2

Random weights at true shapes (configs/SHAPE.json), the same on one device and on all; each layer's threshold is a
quantile of the inputs that those weights produce, as in `benchmark_decode.py`. The token loop is the one that
`generate` runs. What the mesh computes is compared with the one device: the logits of one step, and the tokens that
follow. `--no-one` leaves the single device out, for models that it cannot hold; their weights are made in their parts.
Two devices of 80 GB run `--shape llama-3-70b` in int8, not in bfloat16: docs/benchmarks/mesh.md.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import NamedSharding, PartitionSpec

from wisparse_jax.benchmark.decode import first_state
from wisparse_jax.benchmark.device_time import measure
from wisparse_jax.benchmark.random_model import calibrated, random_cache, random_params
from wisparse_jax.inference import GREEDY
from wisparse_jax.inference.loop import LoopState, NextLogits, decode_implementation, token_logits, token_loop
from wisparse_jax.models.config import LlamaConfig, read_config
from wisparse_jax.models.decode import group_thresholds, kernel_token_logits
from wisparse_jax.models.forward import Cache, Params
from wisparse_jax.models.mesh import MODEL, make_mesh, mesh_of, place_on
from wisparse_jax.models.mesh_decode import mesh_token_logits
from wisparse_jax.models.quantise import quantise_params
from wisparse_jax.models.rules import rules_of
from wisparse_jax.presets import shapes

PROFILED = 16  # tokens of the run under the profiler
ONE = "one device"
COLLECTIVES = ("nccl", "all_reduce", "allreduce", "all-reduce", "one_shot", "all_gather", "all-gather")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time decoding on one device and on a mesh."""

    shape: str = "llama-3.1-8b"  # a file of configs/
    mesh: str = "model=2"
    sparsity: float = 0.5
    context: int = 512
    dtype: str = "bfloat16"
    weights: Literal["stored", "int8", "int4"] = "stored"
    implementation: Literal["triton", "xla"] = "triton"  # xla runs anywhere, for a test of this script
    one: bool = True  # also on one device
    dense: bool = True  # also dense
    tokens: int = 96
    repeats: int = 5
    blocks: int | None = None  # fewer than the shape has, for a quick look
    profile: bool = True
    json: bool = False  # one JSON object and nothing else


class Run(NamedTuple):
    """One row of the table."""

    name: str
    params: Params
    cache: Cache
    step: Callable[..., Any]
    more: dict[str, Any]  # arrays that the step takes besides: the thresholds of a sparse one


def main() -> None:
    """Run every combination and print a table."""
    args = tyro.cli(Arguments, description=__doc__)
    if args.implementation == "triton" and jax.default_backend() != "gpu":
        sys.exit("benchmark_mesh: needs NVIDIA GPUs")
    config = read_config(shapes()[args.shape])
    if args.blocks is not None:
        config = dataclasses.replace(config, num_blocks=args.blocks, windows=config.windows[: args.blocks])
    began = time.perf_counter()
    runs = made_runs(args, config)
    programs = compiled(config, runs, args)
    print(f"prepared in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    results = {run.name: measured(args, run, *programs[run.name]) for run in runs}
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"
    flags = f", {os.environ['XLA_FLAGS']}" if "XLA_FLAGS" in os.environ else ""
    what = f"{args.shape}, {args.dtype}, weights {args.weights}, {args.sparsity:.0%}, context {args.context}"
    title = f"{what}, {device}{flags}"
    rows = [{"run": name, **result.row} for name, result in results.items()]
    print(json.dumps({"title": title, "runs": rows, "checks": checks(args, results)}) if args.json else title)
    if not args.json:
        print(table(rows), *checks(args, results), sep="\n")


def made_runs(args: Arguments, config: LlamaConfig) -> list[Run]:
    """What is timed: dense and sparse, on one device and on the mesh."""
    weights = None if args.weights == "stored" else args.weights
    mesh, slots = make_mesh(args.mesh, config, weights), args.context + args.tokens + 8
    split, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((None, None, MODEL), ()))
    places: dict[str, tuple[Params, Cache]] = {}
    if args.one:
        places[ONE] = random_params(config, args.dtype), random_cache(config, 1, slots, jnp.dtype(args.dtype))
        places[args.mesh] = place_on(mesh, config, places[ONE][0]), jax.device_put(places[ONE][1], split)
    else:
        cache = random_cache(config, 1, slots, jnp.dtype(args.dtype), split)
        places[args.mesh] = random_params(config, args.dtype, mesh, weights), cache
    grouped = group_thresholds(calibrated(config, *next(iter(places.values())), args.context, 1, args.sparsity))
    if weights is not None and args.one:
        places = {place: (quantise_params(params, weights), cache) for place, (params, cache) in places.items()}
        places[args.mesh] = place_on(mesh, config, places[args.mesh][0]), places[args.mesh][1]
    steps = {
        ONE: functools.partial(kernel_token_logits, config, implementation=args.implementation),
        args.mesh: functools.partial(mesh_token_logits, config, mesh=mesh, implementation=args.implementation),
    }
    runs = []
    for place, own in places.items():
        limits = grouped if place == ONE else jax.device_put(grouped, whole)
        if args.dense:
            runs.append(Run(f"dense, xla, {place}", *own, functools.partial(token_logits, config, rules=None), {}))
        runs.append(Run(f"sparse, {args.implementation}, {place}", *own, steps[place], {"thresholds": limits}))
    if args.one and decode_implementation(config, places[ONE][0], rules_of([]), 1) == "mosaic":
        fused = functools.partial(kernel_token_logits, config, implementation="mosaic")
        runs.append(Run(f"sparse, mosaic, {ONE}", *places[ONE], fused, {"thresholds": grouped}))
    return runs


def compiled(config: LlamaConfig, runs: list[Run], args: Arguments) -> dict[str, tuple[Any, Any]]:
    """Of every run the library's token loop around its step, and the step alone; all compiled at once."""
    start, stops, values = jnp.zeros(1, jnp.int32), jnp.full(1, -2, jnp.int32), GREEDY.values(config.vocab_size)

    def lowered(run: Run) -> list[jax.stages.Lowered]:
        @functools.partial(jax.jit, donate_argnums=2)
        def decode(params: Params, more: Any, state: LoopState, until: jax.Array) -> LoopState:
            step: NextLogits = functools.partial(run.step, params, **more)
            return token_loop(step, state, until, start, values, stops)

        @jax.jit
        def step(params: Params, more: Any, state: LoopState) -> jax.Array:
            return run.step(params, state.last, state.slot, start, state.cache, **more)[0]

        state = first(args, run)
        return [decode.lower(run.params, run.more, state, jnp.int32(0)), step.lower(run.params, run.more, state)]

    every = [one for run in runs for one in lowered(run)]
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda one: one.compile(), every))
    return {run.name: (done[2 * i], done[2 * i + 1]) for i, run in enumerate(runs)}


def first(args: Arguments, run: Run) -> LoopState:
    """Where the loop begins, on the devices of the run."""
    state, mesh = first_state(run.cache, args.tokens, args.context, 1), mesh_of(run.params)
    if mesh is None:
        return state
    rest = jax.device_put(state._replace(cache=[]), NamedSharding(mesh, PartitionSpec()))
    return rest._replace(cache=state.cache)


class Measured(NamedTuple):
    """What came out of a run."""

    row: dict[str, Any]
    ids: np.ndarray
    logits: np.ndarray


def measured(args: Arguments, run: Run, decode: Any, step: Any) -> Measured:
    """Time the loop, then look at what it computes."""

    def once(tokens: int) -> tuple[float, LoopState]:
        state = jax.block_until_ready(first(args, run))
        began = time.perf_counter()
        out = jax.block_until_ready(decode(run.params, run.more, state, jnp.int32(tokens + 1)))
        return time.perf_counter() - began, out

    _, out = once(args.tokens)
    logits = np.asarray(step(run.params, run.more, first(args, run))[0], np.float64)
    seconds = float(np.median([once(args.tokens)[0] for _ in range(args.repeats)])) / args.tokens
    devices = len(run.params["embed"].sharding.device_set)
    leaves = jax.tree.leaves(run.params)
    row: dict[str, Any] = {"devices": devices, "ms": seconds * 1e3, "tokens_per_second": 1 / seconds}
    row["gigabytes_a_device"] = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / 1e9
    if args.profile and jax.default_backend() == "gpu":
        spent = measure(lambda: once(PROFILED)[1])
        kernels = {name: sum(times) * 1e6 / PROFILED / devices for name, times in spent.items()}
        kernels = {name: us for name, us in kernels.items() if not name.startswith("Memcpy")}
        row["busy_us"] = sum(kernels.values())
        row["collectives_us"] = sum(us for name, us in kernels.items() if any(c in name.lower() for c in COLLECTIVES))
        row["kernels"] = dict(sorted(kernels.items(), key=lambda item: -item[1])[:12])
    line = {key: value for key, value in row.items() if key != "kernels"}
    print(json.dumps({"run": run.name, **line}), file=sys.stderr, flush=True)
    return Measured(row, np.asarray(out.tokens)[0, 1:], logits)


def checks(args: Arguments, results: dict[str, Measured]) -> list[str]:
    """How close the mesh comes to the one device, a line each."""
    lines = []
    for kind in ("dense, xla", f"sparse, {args.implementation}"):
        if not {f"{kind}, {ONE}", f"{kind}, {args.mesh}"} <= results.keys():
            continue
        one, many = results[f"{kind}, {ONE}"], results[f"{kind}, {args.mesh}"]
        off = np.abs(one.logits - many.logits).max() / np.abs(one.logits).max()
        same = one.ids == many.ids
        until = len(same) if same.all() else int(np.argmin(same))
        speed = one.row["ms"] / many.row["ms"]
        lines.append(
            f"{kind}: {args.mesh} is {speed:.2f} times one device; logits off by {off:.1e} of the largest, "
            f"most likely token {'the same' if one.logits.argmax() == many.logits.argmax() else 'another'}, "
            f"the first {until} of {args.tokens} tokens the same"
        )
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    """The runs as a Markdown table, and the kernels that take longest."""
    lines = [
        "| run | devices | GB of weights each | ms a token | tok/s | us in kernels | of them in collectives |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spent = f"{row['busy_us']:.0f} | {row['collectives_us']:.0f}" if "busy_us" in row else " | "
        lines.append(
            f"| {row['run']} | {row['devices']} | {row['gigabytes_a_device']:.2f} | {row['ms']:.3f} "
            f"| {row['tokens_per_second']:.1f} | {spent} |"
        )
    for row in rows:
        if row["devices"] > 1 and "kernels" in row:
            top = ", ".join(f"{name[:40]} {us:.0f}" for name, us in row["kernels"].items())
            lines.append(f"\n{row['run']}, us a token and device: {top}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
