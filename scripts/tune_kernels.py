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
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from device_time import measure
from random_model import CONFIGS, calibrated, random_cache, random_params

from kernels_pallas.implementation import mosaic_problem
from kernels_pallas.sparse_product import Config, Ring, config_for
from kernels_pallas.sparse_product.config import (
    RING_COLUMNS,
    heuristic,
    ring_space,
    search_space,
    shape_key,
    splits,
    tuned_file,
)
from wisparse_jax.models.config import INPUT_GROUPS, LlamaConfig, read_config
from wisparse_jax.models.decode import group_thresholds, kernel_token_logits
from wisparse_jax.models.quantise import quantise_params

CONTEXT, STEPS = 512, 4
PART_COST = 0.15e-6  # seconds that the kernel after a product spends on one more partial sum of it
WORTH = 0.97  # of the Triton kernel's time that the Mosaic kernel may take to be chosen
MOSAIC_COST = 0.65e-6  # seconds between a Mosaic kernel and its neighbours, which no kernel's own time shows


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Tune the sparse product."""

    shapes: tuple[str, ...] = ("llama-3.1-8b",)  # files of configs/
    batch: tuple[int, ...] = (1,)
    dtype: str = "bfloat16"
    weights: Literal["stored", "int8"] = "stored"
    trials: int = 40  # of each kind of kernel
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
    file = args.out / tuned_file(device)
    tuned: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    tuned = {"triton": {}, "mosaic": {}, "microseconds": {}} | tuned
    for name in args.shapes:
        config = read_config(CONFIGS / f"{name}.json")
        # One block's weights are many times the cache.
        config = dataclasses.replace(config, num_blocks=1, windows=config.windows[:1])
        for batch in args.batch:
            for key, times in tune(args, config, batch).items():
                best = {kind: min(found, key=found.__getitem__) for kind, found in times.items() if found}
                tuned["triton"][key] = dataclasses.asdict(best[Config])
                tuned["mosaic"].pop(key, None)
                if Ring in best and times[Ring][best[Ring]] < WORTH * times[Config][best[Config]]:
                    tuned["mosaic"][key] = dataclasses.asdict(best[Ring])
                tuned["microseconds"][key] = {
                    name: round(times[kind][best[kind]] * 1e6, 2)
                    for name, kind in (("triton", Config), ("mosaic", Ring))
                    if kind in best
                }
            tuned |= {"device": device, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
            args.out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(tuned, indent=1) + "\n", encoding="utf-8")


def candidates(args: Arguments, size_in: int, sizes_out: tuple[int, ...], batch: int) -> list[Config | Ring]:
    """What is in use now, the heuristic's configuration, the search space in random order, and then Mosaic's."""

    def few_splits(c: Config | Ring) -> bool:
        return splits(c, size_in) <= args.most_splits

    def chosen(first: list[Any], others: Iterable[Any]) -> list[Any]:
        others = list(filter(few_splits, others))
        random.Random(args.seed).shuffle(others)
        every = [*first, *others]
        return (every * args.trials)[: args.trials]

    dtype = weight_dtype(args)
    now = [config_for(size_in, sizes_out, batch, dtype, mosaic) for mosaic in (False, True)]
    configs = chosen(
        [now[0], heuristic(size_in, sizes_out, batch, dtype.itemsize)], search_space(size_in, sizes_out, batch)
    )
    if batch > 1 or dtype.name not in RING_COLUMNS or mosaic_problem() is not None:
        return configs
    return configs + chosen([c for c in now if isinstance(c, Ring)], ring_space(size_in, sizes_out, dtype))


def weight_dtype(args: Arguments) -> np.dtype:
    """What the products read."""
    return jnp.dtype("int8" if args.weights == "int8" else args.dtype)


def tune(args: Arguments, config: LlamaConfig, batch: int) -> dict[str, dict[type, dict[Config | Ring, float]]]:
    """The seconds of each product of a block, by its key, kind of kernel and configuration."""
    params = random_params(config, args.dtype)
    cache = random_cache(config, batch, CONTEXT + 64, params["embed"].dtype)
    thresholds = group_thresholds(calibrated(config, params, cache, CONTEXT, batch, 0.5))
    if args.weights == "int8":
        params = quantise_params(params)
    shapes = {
        g: (config.layer_shapes[names[0]][0], tuple(config.layer_shapes[n][1] for n in names))
        for g, names in INPUT_GROUPS.items()
    }
    tried = {g: candidates(args, *shape, batch) for g, shape in shapes.items()}
    trials = range(min(map(len, tried.values())))
    start, tokens = jnp.zeros(batch, jnp.int32), jnp.arange(5, 5 + batch, dtype=jnp.int32)
    inputs = (params, tokens, jnp.int32(CONTEXT), start, cache, thresholds)

    def compiled(trial: int) -> Any:
        step = functools.partial(kernel_token_logits, config, configs={g: tried[g][trial] for g in shapes})
        try:
            return jax.jit(step).lower(*inputs).compile()
        except Exception as error:  # what the compiler refuses is not a candidate
            return error

    times: dict[str, dict[type, dict[Config | Ring, float]]] = {g: {Config: {}, Ring: {}} for g in shapes}
    with ThreadPoolExecutor(args.threads) as pool:
        programs = list(pool.map(compiled, trials))
    for trial, program in enumerate(programs):
        if isinstance(program, Exception):
            print(f"skipped trial {trial}: {str(program).splitlines()[0][:160]}", file=sys.stderr)
            continue
        jax.block_until_ready(program(*inputs))
        spent = measure(functools.partial(_steps, program, inputs))
        for group, (size_in, sizes_out) in shapes.items():
            name = f"sparse_product_{size_in}x{sum(sizes_out)}"
            events = [t for kernel, launches in spent.items() if name in kernel for t in launches]
            candidate = tried[group][trial]
            cost = PART_COST * splits(candidate, size_in)
            cost += MOSAIC_COST if isinstance(candidate, Ring) else 0.0
            times[group][type(candidate)][candidate] = float(np.median(events)) + cost
    keyed = {shape_key(*shapes[group], batch, weight_dtype(args).itemsize): found for group, found in times.items()}
    for key, kinds in keyed.items():
        every = kinds[Config] | kinds[Ring]
        print(f"{key}: {len(every)} tried", flush=True)
        for candidate in sorted(every, key=every.__getitem__)[:4]:
            print(f"  {every[candidate] * 1e6:.1f} us {candidate}", flush=True)
    return keyed


def _steps(program: Any, inputs: tuple[Any, ...]) -> list[Any]:
    return [program(*inputs)[0] for _ in range(STEPS)]


if __name__ == "__main__":
    main()
