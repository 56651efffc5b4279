"""Find the fastest configurations of the sparse kernels on this GPU, inside the decode step that runs them.

    python scripts/tune_kernels.py --shapes llama-3.1-8b mistral-7b --batch 1 2 4

writes `kernels_pallas/tuned/<device>.json`, adding to what is there. Each trial is a decode step of one block with one
candidate for each of the four products, half of its rows kept, and the profiler says how long each of them took.
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from kernels_pallas.sparse_product import Config, config_for
from kernels_pallas.sparse_product.config import heuristic, search_space, shape_key, splits
from kernels_pallas.tuned import tuned_file
from wisparse_jax.benchmark.device_time import measure
from wisparse_jax.benchmark.random_model import calibrated, random_cache, random_params
from wisparse_jax.models.config import INPUT_GROUPS, LlamaConfig, read_config
from wisparse_jax.models.decode import group_thresholds, kernel_token_logits
from wisparse_jax.models.formats import block_format
from wisparse_jax.models.mesh import part_of
from wisparse_jax.models.quantise import quantise_params
from wisparse_jax.presets import shapes

CONTEXT, STEPS = 512, 4
PART_COST = 0.15e-6  # seconds that the kernel after a product spends on one more partial sum of it


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Tune the sparse product."""

    shapes: tuple[str, ...] = ("llama-3.1-8b",)  # files of configs/
    batch: tuple[int, ...] = (1,)
    parts: int = 1  # of the model axis of a mesh that models are split over
    dtype: str = "bfloat16"
    weights: str = "stored"  # or a format to round to
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
            for key, times in tune_products(args, first_block(config), batch).items():
                if not times:
                    sys.exit(f"tune_kernels: {key}: no candidate compiled")
                fastest = sorted(times, key=times.__getitem__)
                tuned["triton"][key] = dataclasses.asdict(fastest[0])
                tuned["microseconds"][key] = round(times[fastest[0]] * 1e6, 2)
                print(f"{key}: {len(times)} tried", flush=True)
                for candidate in fastest[:4]:
                    print(f"  {times[candidate] * 1e6:.1f} us {candidate}", flush=True)
            tuned |= {"device": device, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
            args.out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(tuned, indent=1) + "\n", encoding="utf-8")


def first_block(config: LlamaConfig) -> LlamaConfig:
    """A model of the shape's first block, whose weights are many times the cache."""
    return dataclasses.replace(config, num_blocks=1, windows=config.windows[:1])


def candidates(args: Arguments, size_in: int, sizes_out: tuple[int, ...], batch: int) -> list[Config]:
    """What is in use now, the heuristic's configuration, and the search space in random order."""
    kind = weight_kind(args)
    first = [config_for(size_in, sizes_out, batch, kind), heuristic(size_in, sizes_out, batch, kind)]
    others = [c for c in search_space(size_in, sizes_out, batch, kind) if splits(c, size_in) <= args.most_splits]
    random.Random(args.seed).shuffle(others)
    return (list(dict.fromkeys([*first, *others])) * args.trials)[: args.trials]


def weight_kind(args: Arguments) -> str:
    """The format of the weights that the products read."""
    return args.dtype if args.weights == "stored" else args.weights


def step_inputs(args: Arguments, config: LlamaConfig, batch: int) -> tuple[Any, ...]:
    """Random weights, a token, its place, a full cache, and thresholds that skip half."""
    params = random_params(config, args.dtype)
    cache = random_cache(config, batch, CONTEXT + 64, params["embed"].dtype)
    limits = calibrated(config, params, cache, CONTEXT, batch, 0.5)
    params = params if args.weights == "stored" else quantise_params(params, args.weights)
    thresholds = group_thresholds(limits, len(block_format(params).planes))
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


def _steps(program: Any, inputs: tuple[Any, ...]) -> list[Any]:
    return [program(*inputs)[0] for _ in range(STEPS)]


if __name__ == "__main__":
    main()
