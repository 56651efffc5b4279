"""Find the fastest configurations of the sparse kernels on this GPU, inside the decode step that runs them.

    python scripts/tune_kernels.py --shapes llama-3.1-8b mistral-7b --batch 1 2 4

writes `kernels_pallas/tuned/<device>.json`, adding to what is there. Each trial is a decode step of one block with one
candidate for each of the four products, half of its rows kept, and the profiler says how long each of them took; for
one sequence then a step of two blocks with one candidate for the launch of both.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from kernels_pallas.fused_block import FusedConfig
from kernels_pallas.fused_block.config import config_for as fused_config_for
from kernels_pallas.fused_block.config import heuristic as fused_heuristic
from kernels_pallas.fused_block.config import search_space as fused_search_space
from kernels_pallas.fused_block.config import shape_key as fused_shape_key
from kernels_pallas.implementation import mosaic_problem, processors
from kernels_pallas.sparse_product import Config, config_for
from kernels_pallas.sparse_product.config import heuristic, search_space, shape_key, splits
from kernels_pallas.tuned import tuned_file
from wisparse_jax.benchmark.device_time import measure
from wisparse_jax.benchmark.random_model import calibrated, random_cache, random_params
from wisparse_jax.models.config import INPUT_GROUPS, LlamaConfig, read_config
from wisparse_jax.models.decode import fused_shape, fused_step_problem, group_thresholds, kernel_token_logits
from wisparse_jax.models.mesh import part_of
from wisparse_jax.models.quantise import quantise_params
from wisparse_jax.presets import shapes

CONTEXT, STEPS = 512, 4
PART_COST = 0.15e-6  # seconds that the kernel after a product spends on one more partial sum of it
Candidate = TypeVar("Candidate", Config, FusedConfig)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Tune the sparse product and the fused block."""

    shapes: tuple[str, ...] = ("llama-3.1-8b",)  # files of configs/
    batch: tuple[int, ...] = (1,)
    parts: int = 1  # of the model axis of a mesh that models are split over
    dtype: str = "bfloat16"
    weights: Literal["stored", "int8", "int4"] = "stored"
    trials: int = 40  # of each kernel
    most_splits: int = 16
    threads: int = 8  # compilations at once
    seed: int = 0
    out: Path = Path("kernels_pallas/tuned")


def main() -> None:
    """Tune every kernel for every shape."""
    args = tyro.cli(Arguments, description=__doc__)
    if jax.default_backend() != "gpu":
        sys.exit("tune_kernels: needs an NVIDIA GPU")
    device = jax.devices()[0].device_kind
    file = args.out / tuned_file(device)
    tuned: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    tuned = {"triton": {}, "mosaic": {}, "microseconds": {}} | tuned
    for name in args.shapes:
        config = part_of(read_config(shapes()[name]), args.parts)
        for batch in args.batch:
            found: dict[str, dict[str, Any]] = {"triton": tune_products(args, first_blocks(config, 1), batch)}
            if batch == 1 and args.parts == 1:  # what a mesh splits is run by separate launches
                found["mosaic"] = tune_fused(args, first_blocks(config, 2))
            for kind, by_key in found.items():
                for key, times in by_key.items():
                    if not times:
                        sys.exit(f"tune_kernels: {key}: no candidate compiled")
                    best = min(times, key=times.__getitem__)
                    tuned[kind][key] = dataclasses.asdict(best)
                    tuned["microseconds"][key] = round(times[best] * 1e6, 2)
                    print(f"{key}: {len(times)} tried", flush=True)
                    for candidate in sorted(times, key=times.__getitem__)[:4]:
                        print(f"  {times[candidate] * 1e6:.1f} us {candidate}", flush=True)
            tuned |= {"device": device, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
            args.out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(tuned, indent=1) + "\n", encoding="utf-8")


def first_blocks(config: LlamaConfig, blocks: int) -> LlamaConfig:
    """A model of the shape's first blocks, each of whose weights are many times the cache."""
    return dataclasses.replace(config, num_blocks=blocks, windows=config.windows[:blocks])


def chosen(args: Arguments, first: list[Candidate], others: Iterable[Candidate]) -> list[Candidate]:
    """As many candidates as trials: some first, and the others in random order."""
    others = list(others)
    random.Random(args.seed).shuffle(others)
    every = list(dict.fromkeys([*first, *others]))
    return (every * args.trials)[: args.trials]


def candidates(args: Arguments, size_in: int, sizes_out: tuple[int, ...], batch: int) -> list[Config]:
    """What is in use now, the heuristic's configuration, and the search space in random order."""
    kind = weight_kind(args)
    first = [config_for(size_in, sizes_out, batch, kind), heuristic(size_in, sizes_out, batch, kind)]
    few = (c for c in search_space(size_in, sizes_out, batch, kind) if splits(c, size_in) <= args.most_splits)
    return chosen(args, first, few)


def weight_kind(args: Arguments) -> str:
    """What the products read."""
    return args.dtype if args.weights == "stored" else args.weights


def step_inputs(args: Arguments, config: LlamaConfig, batch: int) -> tuple[Any, ...]:
    """Random weights, a token, its place, a full cache, and thresholds that skip half."""
    params = random_params(config, args.dtype)
    cache = random_cache(config, batch, CONTEXT + 64, params["embed"].dtype)
    thresholds = group_thresholds(calibrated(config, params, cache, CONTEXT, batch, 0.5))
    params = params if args.weights == "stored" else quantise_params(params, args.weights)
    start, tokens = jnp.zeros(batch, jnp.int32), jnp.arange(5, 5 + batch, dtype=jnp.int32)
    return params, tokens, jnp.int32(CONTEXT), start, cache, thresholds


def trials(
    args: Arguments, steps: list[Callable[..., Any]], inputs: tuple[Any, ...]
) -> Iterable[tuple[int, dict[str, list[float]]]]:
    """The seconds of every launch of each step that compiles, by kernel."""

    def compiled(step: Callable[..., Any]) -> Any:
        try:
            return jax.jit(step).lower(*inputs).compile()
        except Exception as error:  # what the compiler refuses is not a candidate
            return error

    with ThreadPoolExecutor(args.threads) as pool:
        programs = list(pool.map(compiled, steps))
    for trial, program in enumerate(programs):
        if isinstance(program, Exception):
            print(f"skipped trial {trial}: {str(program).splitlines()[0][:160]}", file=sys.stderr)
            continue
        jax.block_until_ready(program(*inputs))
        yield trial, measure(functools.partial(_steps, program, inputs))


def tune_products(args: Arguments, config: LlamaConfig, batch: int) -> dict[str, dict[Config, float]]:
    """The seconds of each product of a block, by its key and configuration."""
    shapes = {
        g: (config.layer_shapes[names[0]][0], tuple(config.layer_shapes[n][1] for n in names))
        for g, names in INPUT_GROUPS.items()
    }
    tried = {g: candidates(args, *shape, batch) for g, shape in shapes.items()}
    steps = [
        functools.partial(kernel_token_logits, config, configs={g: tried[g][i] for g in shapes})
        for i in range(args.trials)
    ]
    times: dict[str, dict[Config, float]] = {g: {} for g in shapes}
    for trial, spent in trials(args, steps, step_inputs(args, config, batch)):
        for group, (size_in, sizes_out) in shapes.items():
            name, candidate = f"sparse_product_{size_in}x{sum(sizes_out)}", tried[group][trial]
            events = [t for kernel, launches in spent.items() if name in kernel for t in launches]
            times[group][candidate] = float(np.median(events)) + PART_COST * splits(candidate, size_in)
    return {shape_key(*shapes[group], batch, weight_kind(args)): found for group, found in times.items()}


def tune_fused(args: Arguments, config: LlamaConfig) -> dict[str, dict[FusedConfig, float]]:
    """The seconds of a launch of two decoder blocks, by their key."""
    inputs = step_inputs(args, config, 1)
    problem = mosaic_problem() or fused_step_problem(config, inputs[0], 1)
    if problem is not None:
        print(f"the fused block {problem}", file=sys.stderr)
        return {}
    shape, blocks, slots = fused_shape(config, inputs[0]), processors(), inputs[4][0].keys.shape[1]
    first = [fused_config_for(shape, blocks, slots), fused_heuristic(shape, blocks, slots)]
    tried = chosen(args, first, fused_search_space(shape, blocks))
    steps = [
        functools.partial(kernel_token_logits, config, implementation="mosaic", fused_config=candidate)
        for candidate in tried
    ]
    times = {}
    for trial, spent in trials(args, steps, inputs):
        launches = [t for name, own in spent.items() if "fused_block" in name for t in own]
        times[tried[trial]] = float(np.median(launches))
    return {fused_shape_key(shape): times}


def _steps(program: Any, inputs: tuple[Any, ...]) -> list[Any]:
    return [program(*inputs)[0] for _ in range(STEPS)]


if __name__ == "__main__":
    main()
