"""Candidates per second of the block-budget search: the whole population in one compiled program, or one by one.

    python scripts/benchmark_search.py demo --out docs/benchmarks/search.md

Every candidate is the KL of the whole model at its own block budgets, on the same tokens. Where there are
several devices, each has the whole model and some of the candidates, and one device alone stands beside all of them.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from tyro.conf import Positional

from wisparse_jax.arguments import check_count
from wisparse_jax.benchmark.random_model import random_params
from wisparse_jax.calibration import run_dense
from wisparse_jax.errors import WisparseError
from wisparse_jax.inference import sample_windows
from wisparse_jax.models.config import LAYERS, read_config
from wisparse_jax.models.loading import load
from wisparse_jax.models.model import Model
from wisparse_jax.presets import shapes
from wisparse_jax.search import SearchSettings
from wisparse_jax.search.losses import KLLoss
from wisparse_jax.sparsity.budget import project_to_mean
from wisparse_jax.testing import count_compilations


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time the evaluation of a population."""

    model: Positional[str]  # or the name of a shape that gets random weights and text, such as llama-3.2-1b
    out: Path | None = None  # Markdown to append to; by default only printed
    population: int = 32
    tokens: int = 1_024  # sparse positions of each evaluation
    chunks: tuple[int, ...] = (8, 32)  # candidates at once on a device, at most
    repeats: int = 5
    dtype: str = "float32"


def main() -> None:
    """Run the benchmark and print a table."""
    args = tyro.cli(Arguments, description=__doc__)
    try:
        for name in ("population", "tokens", "repeats"):
            check_count(getattr(args, name), name, least=1)
        for chunk in args.chunks:
            check_count(chunk, "chunks", least=2)
    except WisparseError as error:
        sys.exit(f"benchmark_search: {error}")
    settings = SearchSettings(tokens=2 * args.tokens, block_tokens=args.tokens, statistics_tokens=args.tokens)
    try:
        if (shape := shapes().get(args.model)) is None:
            model = load(args.model, args.dtype)
            windows = sample_windows(model, -(-settings.tokens // settings.window), settings.window, seed=0)
        else:
            config = read_config(shape)
            model = Model(config, random_params(config, args.dtype))
            size = (-(-settings.tokens // settings.window), settings.window)
            windows = np.random.default_rng(0).integers(0, config.vocab_size, size)
    except WisparseError as error:
        sys.exit(f"benchmark_search: {error}")
    calibration = run_dense(model, windows, settings)
    blocks = model.config.num_blocks
    rng, weights = np.random.default_rng(0), np.ones(blocks)
    exponents = np.zeros((blocks, len(LAYERS)))

    def population() -> np.ndarray:
        """Fresh thresholds of random budgets around 50 %."""
        rows = [project_to_mean(row, weights, 0.5) for row in 0.5 + 0.05 * rng.normal(size=(args.population, blocks))]
        budgets = np.repeat(np.stack(rows)[:, :, None], len(LAYERS), axis=2)
        thresholds = [s.thresholds(exponents[b], budgets[:, b]) for b, s in enumerate(calibration.statistics)]
        return np.stack(thresholds, axis=1)

    rows, reference = [], None
    devices = jax.local_devices()
    some = [devices[:1], devices] if len(devices) > 1 else [devices]
    for chunk, used in [(1, devices[:1]), *((chunk, used) for chunk in args.chunks for used in some)]:
        loss = KLLoss(calibration, args.tokens, chunk, used)

        def run(thresholds: np.ndarray, chunk: int = chunk, loss: KLLoss = loss) -> np.ndarray:
            if chunk == 1:
                return np.concatenate([loss(exponents, row[None]) for row in thresholds])
            return loss(exponents, thresholds)

        first = time.perf_counter()
        run(population())
        first = time.perf_counter() - first
        seconds = []
        with count_compilations() as compilations:
            for _ in range(args.repeats):
                thresholds = population()
                started = time.perf_counter()
                run(thresholds)
                seconds.append(time.perf_counter() - started)
        rate = args.population / float(np.median(seconds))
        reference = reference or rate
        name = "one by one" if chunk == 1 else f"vectorised, {chunk} at once"
        if len(used) > 1:
            name += f", {len(used)} devices"
        rows.append(f"| {name} | {rate:.1f} | {rate / reference:.2f}x | {first:.1f} | {compilations.count} |")
        print(rows[-1], file=sys.stderr, flush=True)

    device = jax.devices()[0]
    place = f"cpu, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    place = f"{len(devices)} x {place}" if len(devices) > 1 else place
    command = " ".join(["python", "scripts/benchmark_search.py", *sys.argv[1:]])
    text = (
        f"## {place}\n\n"
        f"Command: `{command}`  \nDate: {time.strftime('%Y-%m-%d')}; jax {jax.__version__}; {args.dtype}; population "
        f"{args.population}; {calibration.tokens.size} tokens an evaluation; median of {args.repeats} populations\n\n"
        "| evaluation | candidates/s | against one by one | first call, s | compilations after it |\n"
        "|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        head = "" if args.out.exists() else "# The search's population evaluation\n\n"
        with args.out.open("a", encoding="utf-8") as file:
            file.write(head + text + "\n")


if __name__ == "__main__":
    main()
