"""Find the fastest configurations of the sparse product on this GPU, inside the decode step that runs them.

    python scripts/tune_kernels.py --shapes llama-3.1-8b mistral-7b --batch 1 2 4

writes `kernels_pallas/tuned/<device>.json`, adding to what is there. Each trial is a decode step of one block with one
candidate for each of the four products; the profiler says how long each of them took, half of its rows kept.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from device_time import measure
from random_model import CONFIGS, calibrated, random_cache, random_params

from kernels_pallas.sparse_product import Config
from kernels_pallas.sparse_product.config import heuristic, search_space, shape_key
from wisparse_jax.models.config import INPUT_GROUPS, LlamaConfig, read_config
from wisparse_jax.models.decode import group_thresholds, kernel_token_logits

CONTEXT, STEPS = 512, 4
PART_COST = 0.15e-6  # seconds that the kernel after a product spends on one more partial sum of it


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Tune the sparse product."""

    shapes: tuple[str, ...] = ("llama-3.1-8b",)  # files of configs/
    batch: tuple[int, ...] = (1,)
    dtype: str = "bfloat16"
    trials: int = 40
    most_splits: int = 16
    threads: int = 8  # compilations at once
    seed: int = 0
    out: Path = Path("kernels_pallas/tuned")


def main() -> None:
    """Tune every group of every shape."""
    args = tyro.cli(Arguments, description=__doc__)
    if jax.default_backend() != "gpu":
        sys.exit("tune_kernels: needs an NVIDIA GPU")
    device = jax.devices()[0].device_kind
    file = args.out / (device.lower().replace(" ", "-") + ".json")
    tuned: dict[str, Any] = (
        json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"sparse_product": {}, "microseconds": {}}
    )
    for name in args.shapes:
        config = read_config(CONFIGS / f"{name}.json")
        # One block's weights are many times the cache.
        config = dataclasses.replace(config, num_blocks=1, windows=config.windows[:1])
        for batch in args.batch:
            for key, (best, seconds) in tune(args, config, batch).items():
                tuned["sparse_product"][key] = dataclasses.asdict(best)
                tuned["microseconds"][key] = round(seconds * 1e6, 2)
            tuned |= {"device": device, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
            args.out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(tuned, indent=1) + "\n", encoding="utf-8")


def candidates(args: Arguments, size_in: int, sizes_out: tuple[int, ...], batch: int, width: int) -> list[Config]:
    """The heuristic's configuration, then the search space in random order."""
    others = [
        c for c in search_space(size_in, sizes_out, batch) if -(-size_in // (c.rows * c.lists)) <= args.most_splits
    ]
    random.Random(args.seed).shuffle(others)
    return ([heuristic(size_in, sizes_out, batch, width), *others] * args.trials)[: args.trials]


def tune(args: Arguments, config: LlamaConfig, batch: int) -> dict[str, tuple[Config, float]]:
    """The fastest configuration of each product of a block, and its seconds."""
    params = random_params(config, args.dtype)
    cache = random_cache(config, batch, CONTEXT + 64, params["embed"].dtype)
    thresholds = group_thresholds(calibrated(config, params, cache, CONTEXT, batch, 0.5))
    width = jnp.dtype(args.dtype).itemsize
    shapes = {
        g: (config.layer_shapes[names[0]][0], tuple(config.layer_shapes[n][1] for n in names))
        for g, names in INPUT_GROUPS.items()
    }
    tried = {g: candidates(args, *shape, batch, width) for g, shape in shapes.items()}
    start, tokens = jnp.zeros(batch, jnp.int32), jnp.arange(5, 5 + batch, dtype=jnp.int32)
    inputs = (params, tokens, jnp.int32(CONTEXT), start, cache, thresholds)

    def compiled(trial: int) -> Any:
        step = functools.partial(kernel_token_logits, config, configs={g: tried[g][trial] for g in shapes})
        try:
            return jax.jit(step).lower(*inputs).compile()
        except Exception as error:  # what the compiler refuses is not a candidate
            return error

    times: dict[str, dict[Config, float]] = {g: {} for g in shapes}
    with ThreadPoolExecutor(args.threads) as pool:
        programs = list(pool.map(compiled, range(args.trials)))
    for trial, program in enumerate(programs):
        if isinstance(program, Exception):
            print(f"skipped trial {trial}: {str(program).splitlines()[0][:160]}", file=sys.stderr)
            continue
        jax.block_until_ready(program(*inputs))
        spent = measure(functools.partial(_steps, program, inputs))
        for group, (size_in, sizes_out) in shapes.items():
            name = f"sparse_product_{size_in}x{sum(sizes_out)}"
            events = [t for kernel, launches in spent.kernels.items() if kernel.startswith(name) for t in launches]
            candidate = tried[group][trial]
            splits = -(-size_in // (candidate.rows * candidate.lists))
            times[group][candidate] = float(np.median(events)) + PART_COST * splits
    best = {}
    for group, (size_in, sizes_out) in shapes.items():
        key, ranked = shape_key(size_in, sizes_out, batch, width), sorted(times[group], key=times[group].__getitem__)
        best[key] = (ranked[0], times[group][ranked[0]])
        first = times[group].get(tried[group][0], float("nan"))
        print(f"{key}: {len(ranked)} tried; heuristic {first * 1e6:.1f} us", flush=True)
        for candidate in ranked[:4]:
            print(f"  {times[group][candidate] * 1e6:.1f} us {candidate}", flush=True)
    return best


def _steps(program: Any, inputs: tuple[Any, ...]) -> list[Any]:
    return [program(*inputs)[0] for _ in range(STEPS)]


if __name__ == "__main__":
    main()
