"""The budget problem that every allocator solves: what it may ask, and what its answers cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from wisparse_jax.calibration.dense import Calibration
from wisparse_jax.calibration.gradients import layer_costs
from wisparse_jax.calibration.settings import GradientSettings, Settings, setting
from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.search.greedy_path import Path, greedy_path, increments
from wisparse_jax.search.losses import BlockLoss, KLLoss, LossSettings
from wisparse_jax.search.state import SearchState, Spent, identity_of
from wisparse_jax.sparsity.budget import project_to_mean

Table = Float64[np.ndarray, "blocks 7"]
Progress = Callable[..., Iterable[int]]  # `Progress.steps`
BACKWARD = 3  # a forward and a backward pass, in forward passes
LEVELS = 39  # points of a cost curve, 0.025 apart: budgets end on them


@dataclasses.dataclass(frozen=True)
class BudgetSettings(LossSettings, GradientSettings):
    """Settings of what allocators may ask."""

    max_sparsity: float = setting(0.95, share=True)  # of any layer
    block_tokens: int = setting(4_096)  # sparse positions on which the KL of candidates is measured
    # sparsity that one step of a greedy path adds to the largest layer
    layer_step: float = setting(0.02, share=True, least=1e-4)
    layer_tokens: int = setting(2_048)  # sparse positions on which the errors of a path's steps are measured


class LayerKey(NamedTuple):
    """Which layer a budget is of; `plane` counts the parts of a weight that have budgets of their own."""

    block: int
    name: str
    plane: int = 0


class Evidence:
    """What has been computed for exponents of one run, whatever the target."""

    def __init__(self) -> None:
        self.paths: list[Path] | None = None
        self.costs: Float64[np.ndarray, "blocks 7 levels"] | None = None
        self.loss: KLLoss | None = None


@dataclasses.dataclass(eq=False)
class BudgetProblem:
    """Sparsities of every layer, their mean over weights the target, that lose least.

    An allocator asks for what it needs: the KL of candidates, the greedy path of every block, second-order costs. Each
    answer is computed when it is first asked for, serves the same problem at every target, and is counted in `spent`.
    """

    calibration: Calibration
    exponents: Table
    settings: Settings
    seed: int
    progress: Progress = lambda numbers, tokens=None: numbers
    spent: Spent = dataclasses.field(default_factory=Spent)
    state: SearchState = dataclasses.field(default_factory=SearchState)
    target: float = 0.5
    known: Evidence = dataclasses.field(default_factory=Evidence)

    def aim(self, target: float) -> BudgetProblem:
        """The problem at another target; what does not depend on it is shared, not computed again."""
        return dataclasses.replace(self, target=target)

    @cached_property
    def _settings(self) -> BudgetSettings:
        return BudgetSettings.of(self.settings)

    @cached_property
    def _prefix(self) -> str:
        """What the names of kept answers begin with: a digest of the exponents and the basis that they are for."""
        basis = self.calibration.basis
        return identity_of(self.exponents, None if basis is None else basis.digest())[:8]

    @cached_property
    def _journal(self) -> Callable[[Callable[[np.ndarray], np.ndarray], np.ndarray], np.ndarray]:
        return self.state.journal(f"{self._prefix} populations {self.target:g}")

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return self.calibration.config.num_blocks

    @property
    def weights(self) -> Float64[np.ndarray, "7"]:
        """Number of weights of each layer of a block."""
        return np.asarray(self.calibration.config.layer_weights, np.float64)

    @property
    def layers(self) -> list[LayerKey]:
        """Every layer that has a budget, in the order of `shares` and `curves`."""
        return [LayerKey(block, name) for block in range(self.blocks) for name in LAYERS]

    @property
    def shares(self) -> Float64[np.ndarray, " layers"]:
        """What a layer counts in the mean: its weights, in bits, over those of all layers."""
        return np.tile(self.weights / self.weights.sum() / self.blocks, self.blocks)

    @property
    def curves(self) -> Float64[np.ndarray, "layers levels"]:
        """The `costs` of every one of `layers`."""
        return self.costs.reshape(-1, len(self.levels))

    def table(self, sparsities: Float64[np.ndarray, " layers"]) -> Table:
        """The sparsities of `layers` as a table of blocks and layer names."""
        return sparsities.reshape(self.blocks, -1)

    @property
    def max_sparsity(self) -> float:
        """The largest sparsity that any layer may have."""
        return self._settings.max_sparsity

    @property
    def levels(self) -> Float64[np.ndarray, " levels"]:
        """The sparsities that costs are measured at."""
        return np.linspace(0.0, self.max_sparsity, LEVELS)

    def kl(self, sparsities: Float64[np.ndarray, "candidates blocks 7"]) -> Float64[np.ndarray, " candidates"]:
        """KL(dense || sparse) of candidates, nats per token; infinite where it is not a number."""
        self.spent.tokens += len(sparsities) * self._kl_loss.tokens
        return self._journal(self._ask, sparsities)

    def _ask(self, sparsities: Float64[np.ndarray, "candidates blocks 7"]) -> Float64[np.ndarray, " candidates"]:
        statistics = enumerate(self.calibration.statistics)
        thresholds = [block.thresholds(self.exponents[b], sparsities[:, b]) for b, block in statistics]
        return self._kl_loss(self.exponents, np.stack(thresholds, axis=1))

    @property
    def _kl_loss(self) -> KLLoss:
        if self.known.loss is None:
            self.known.loss = KLLoss(self.calibration, self._settings.block_tokens, self._settings.chunk)
        return self.known.loss

    @property
    def paths(self) -> list[Path]:
        """Every block's greedy path of layer sparsities, from dense to as sparse as may be, with the block errors."""
        if self.known.paths is None:
            paths = []
            for b in self.progress(range(self.blocks), path_tokens(self.calibration.config, self._settings)):
                path = self.state.keep(f"{self._prefix} path {b}", lambda b=b: self._path(b), self.spent)
                paths.append(Path(path["sparsities"], path["errors"]))
            self.known.paths = paths
        return self.known.paths

    def _path(self, b: int) -> dict[str, np.ndarray]:
        settings, statistics = self._settings, self.calibration.statistics[b]
        loss, most = BlockLoss(self.calibration, b, settings.layer_tokens, settings.chunk), settings.max_sparsity
        path = greedy_path(loss, statistics, self.exponents[b], self.weights, most, settings.layer_step, most)
        self.spent.tokens += len(path.errors) * len(LAYERS) * loss.tokens
        return path._asdict()

    def on_paths(self, budgets: Float64[np.ndarray, "candidates blocks"]) -> Float64[np.ndarray, "candidates blocks 7"]:
        """The layer sparsities that block budgets get: the points of the greedy paths where they are met."""
        return np.stack([path.at(self.weights, budgets[:, b]) for b, path in enumerate(self.paths)], axis=1)

    @property
    def costs(self) -> Float64[np.ndarray, "blocks 7 levels"]:
        """The second-order cost of every layer at every one of `levels`, nats per token; they add up over layers."""
        if self.known.costs is None:
            self.known.costs = self.state.keep(f"{self._prefix} costs {LEVELS}", self._costs, self.spent)["costs"]
        return self.known.costs

    def _costs(self) -> dict[str, np.ndarray]:
        tokens = self._settings.gradient_tokens
        costs = layer_costs(self.calibration, self.exponents, self.levels, tokens, self.seed)
        self.spent.tokens += BACKWARD * tokens
        return {"costs": costs}

    def predicted(self, sparsities: Table) -> float:
        """The KL that the second-order costs add up to."""
        cells = np.ndindex(sparsities.shape)
        return float(sum(np.interp(sparsities[b, i], self.levels, self.costs[b, i]) for b, i in cells))

    def uniform(self) -> Table:
        """The table that has the target everywhere."""
        return np.full((self.blocks, len(LAYERS)), self.target)

    def within_budget(
        self, budgets: Float64[np.ndarray, "candidates blocks"]
    ) -> Float64[np.ndarray, "candidates blocks"]:
        """Block budgets moved to the nearest that meet the target exactly."""
        equal = np.ones(self.blocks)
        return np.stack([project_to_mean(row, equal, self.target, 0.0, self.max_sparsity) for row in budgets])


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A budget and how it was found."""

    sparsities: Table
    history: dict[str, Any]


def path_tokens(config: LlamaConfig, settings: BudgetSettings) -> float:
    """Tokens through the model that the greedy paths of all blocks take: a block's share of it counts as that share."""
    steps = np.ceil(settings.max_sparsity / increments(np.asarray(config.layer_weights, float), settings.layer_step))
    return len(LAYERS) * settings.layer_tokens * float(steps.sum())
