"""The stages in order: statistics, exponents, block budgets, layer budgets, exponents again, thresholds.

Each stage is a function of the calibration, the plan so far and the seed, and is timed; methods and settings only
choose which of them run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float64, Int

from wisparse_jax import __version__
from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.llama import Llama
from wisparse_jax.models.loading import model_fingerprint
from wisparse_jax.search.block_budgets import evolve_block_budgets
from wisparse_jax.search.calibration import Calibration, run_dense
from wisparse_jax.search.exponents import search_exponents
from wisparse_jax.search.layer_budgets import greedy_path, on_path
from wisparse_jax.search.objectives import BlockLoss, DivergenceLoss
from wisparse_jax.search.settings import SearchSettings
from wisparse_jax.sparsity.methods import Method, get_method
from wisparse_jax.sparsity.plan import SparsityPlan

Table = Float64[np.ndarray, "blocks 7"]


def calibrate(
    model: Llama,
    tokens: Int[Array, "windows length"] | Int[np.ndarray, "windows length"],
    sparsity: float = 0.5,
    method: str = "wisparse",
    seed: int = 0,
    settings: SearchSettings | None = None,
    progress: bool = False,
    text: str = "tokens given by the caller",
) -> SparsityPlan:
    """Search a plan for the model on calibration text.

    Args:
        model: the dense model.
        tokens: windows of calibration text, token ids.
        sparsity: the share of channels to skip, averaged over all block linears weighted by parameter count.
        method: one of `METHODS`.
        seed: of the evolution and of the sampled statistics.
        settings: the search's budget; None for the defaults.
        progress: show progress bars on standard error.
        text: where the tokens come from, for the plan's record.

    Raises:
        WisparseError: unknown method, a sparsity that the settings do not allow, or tokens the model cannot read.
    """
    settings = SearchSettings() if settings is None else settings
    check_sparsity(sparsity, settings)
    get_method(method)
    started = time.perf_counter()
    ids = np.asarray(tokens, np.int32)
    calibration = run_dense(model.config, model.params, ids, settings, seed)
    jax.block_until_ready(calibration.hidden)
    elapsed = time.perf_counter() - started
    record = {"text": text, "tokens": int(ids.size), "window": int(ids.shape[1])}
    return search_plan(
        calibration, model_fingerprint(model), sparsity, method, seed, settings, progress, record, elapsed
    )


def check_sparsity(sparsity: float, settings: SearchSettings) -> None:
    """Refuse a target that no budget can meet.

    Raises:
        WisparseError: not a number in [0, max_sparsity].
    """
    if not 0 <= sparsity <= settings.max_sparsity:
        raise WisparseError(f"sparsity = {sparsity}: expected a number from 0 to {settings.max_sparsity}")


def search_plan(
    calibration: Calibration,
    fingerprint: str,
    sparsity: float,
    method: str,
    seed: int,
    settings: SearchSettings,
    progress: bool = False,
    record: dict[str, Any] | None = None,
    statistics_seconds: float = 0.0,
) -> SparsityPlan:
    """Search a plan on a dense run that may serve several methods and targets; arguments as in `calibrate`."""
    chosen = get_method(method)
    search = _Search(calibration, chosen, sparsity, seed, settings, progress)
    search.timings["statistics"] = statistics_seconds
    exponents, sparsities = search.run()
    with search.stage("thresholds"):
        taus = _thresholds(calibration, exponents, sparsities)
    return SparsityPlan(
        method=method,
        target=float(sparsity),
        exponents=exponents,
        sparsities=sparsities,
        thresholds=taus,
        layer_weights=calibration.config.layer_weights,
        fingerprint=fingerprint,
        seed=seed,
        calibration={**(record or {}), "sparse_positions": int(calibration.tokens.size)},
        settings=dataclasses.asdict(settings),
        timings={name: round(seconds, 3) for name, seconds in search.timings.items()},
        history=search.history,
        version=__version__,
    )


def _thresholds(calibration: Calibration, exponents: Table, sparsities: Table) -> Table:
    rows = zip(calibration.statistics, exponents, sparsities, strict=True)
    return np.stack([statistics.thresholds(a, p) for statistics, a, p in rows])


class _Search:
    """The stages over one calibration; `run` gives the exponents and the sparsities."""

    def __init__(
        self,
        calibration: Calibration,
        method: Method,
        sparsity: float,
        seed: int,
        settings: SearchSettings,
        progress: bool,
    ):
        self.calibration, self.settings, self.seed = calibration, settings, seed
        self.target, self.method, self.progress = sparsity, method, progress
        self.blocks = calibration.config.num_blocks
        self.weights = np.asarray(calibration.config.layer_weights, np.float64)
        self.timings: dict[str, float] = {}
        self.history: dict[str, Any] = {}

    def run(self) -> tuple[Table, Table]:
        shape = (self.blocks, len(LAYERS))
        exponents = np.full(shape, self.method.exponent)
        sparsities = np.full(shape, self.target)
        searched = self.method.search_exponents and self.settings.search_exponents
        by_block = self.method.search_blocks and self.settings.search_blocks and self.target > 0
        by_layer = self.method.search_layers and self.settings.search_layers and self.target > 0
        if searched:
            exponents = self.exponents("exponents", exponents, sparsities)
        if by_block:
            sparsities = self.block_budgets(exponents)
        if by_layer:
            sparsities = self.layer_budgets(exponents, sparsities)
        if searched and (by_block or by_layer):
            exponents = self.exponents("final exponents", exponents, sparsities)
        return exponents, sparsities

    def exponents(self, name: str, start: Table, sparsities: Table) -> Table:
        settings = self.settings
        found, errors = [], []
        with self.stage(name):
            for b in self.bar(range(self.blocks), name):
                loss = BlockLoss(self.calibration, b, settings.exponent_tokens, settings.chunk)
                statistics = self.calibration.statistics[b]
                best, curve = search_exponents(
                    loss, statistics, start[b], sparsities[b], settings.exponents, settings.exponent_passes
                )
                found.append(best)
                errors.append([curve[0], curve[-1]])
        self.history[name] = {"block_error_before_and_after": errors}
        return np.stack(found)

    def block_budgets(self, exponents: Table) -> Table:
        settings = self.settings
        divergence = DivergenceLoss(self.calibration, settings.block_tokens, settings.chunk)

        def fitness(budgets: np.ndarray) -> np.ndarray:
            per_layer = np.repeat(budgets[:, :, None], len(LAYERS), axis=2)
            taus = [
                statistics.thresholds(exponents[b], per_layer[:, b])
                for b, statistics in enumerate(self.calibration.statistics)
            ]
            return divergence(exponents, np.stack(taus, axis=1))

        with self.stage("block budgets"):
            weights = np.full(self.blocks, self.weights.sum())
            budget, history = evolve_block_budgets(
                fitness, weights, self.target, settings, self.seed, lambda steps: self.bar(steps, "block budgets")
            )
        self.history["block budgets"] = history
        return np.repeat(budget[:, None], len(LAYERS), axis=1)

    def layer_budgets(self, exponents: Table, sparsities: Table) -> Table:
        settings = self.settings
        found, paths = [], []
        with self.stage("layer budgets"):
            for b in self.bar(range(self.blocks), "layer budgets"):
                loss = BlockLoss(self.calibration, b, settings.layer_tokens, settings.chunk)
                target = float(sparsities[b, 0])
                path, errors = greedy_path(
                    loss,
                    self.calibration.statistics[b],
                    exponents[b],
                    self.weights,
                    target,
                    settings.layer_step,
                    settings.max_sparsity,
                )
                found.append(on_path(path, self.weights, target))
                paths.append({"sparsities": path.round(6).tolist(), "block_error": errors.tolist()})
        self.history["layer budgets"] = {"paths": paths}
        return np.stack(found)

    def bar(self, steps: Iterable[int], name: str) -> Iterable[int]:
        from tqdm import tqdm

        return tqdm(steps, desc=f"{self.method.name}: {name}", disable=not self.progress, leave=False)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.timings[name] = time.perf_counter() - started
