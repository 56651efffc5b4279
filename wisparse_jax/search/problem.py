"""The budget problem that every allocator solves: what it may ask, and what its answers cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float64

from wisparse_jax.calibration.dense import Calibration
from wisparse_jax.calibration.gradients import layer_costs
from wisparse_jax.calibration.settings import SearchSettings
from wisparse_jax.models.config import LAYERS
from wisparse_jax.search.greedy_path import Path, greedy_path
from wisparse_jax.search.losses import BlockLoss, DivergenceLoss
from wisparse_jax.search.state import SearchState, Spent, identity_of
from wisparse_jax.sparsity.budget import project_to_mean

Table = Float64[np.ndarray, "blocks 7"]
Progress = Callable[[Iterable[int]], Iterable[int]]
LEVELS = 39  # points of a cost curve, 0.025 apart: budgets end on them


@dataclasses.dataclass
class BudgetProblem:
    """Sparsities of every layer, their mean over weights the target, that lose least.

    An allocator asks for what it needs: the KL of candidates, the greedy path of every block, second-order costs. Each
    answer is computed when it is first asked for, serves every later target, and is counted in `spent`.
    """

    calibration: Calibration
    exponents: Table
    settings: SearchSettings
    seed: int
    progress: Progress = iter
    spent: Spent = dataclasses.field(default_factory=Spent)
    state: SearchState = dataclasses.field(default_factory=SearchState)
    target: float = 0.5

    def __post_init__(self) -> None:
        """Name what is kept after the exponents and the basis that it is for."""
        basis = self.calibration.basis
        self._prefix = identity_of(self.exponents, None if basis is None else basis.digest())[:8]
        self.aim(self.target)

    def aim(self, target: float) -> BudgetProblem:
        """The same problem at another target; what does not depend on it is not computed again."""
        self.target = target
        self._journal = self.state.journal(f"{self._prefix} populations {target:g}")
        return self

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return self.calibration.config.num_blocks

    @property
    def weights(self) -> Float64[np.ndarray, "7"]:
        """Number of weights of each layer of a block."""
        return np.asarray(self.calibration.config.layer_weights, np.float64)

    @property
    def max_sparsity(self) -> float:
        """Of any layer."""
        return self.settings.max_sparsity

    @property
    def levels(self) -> Float64[np.ndarray, " levels"]:
        """The sparsities that costs are measured at."""
        return np.linspace(0.0, self.max_sparsity, LEVELS)

    def divergence(self, sparsities: Float64[np.ndarray, "candidates blocks 7"]) -> Float64[np.ndarray, " candidates"]:
        """KL(dense || sparse) of candidates, nats per token; infinite where it is not a number."""
        self.spent.tokens += len(sparsities) * self._divergence.tokens
        return self._journal(self._ask, sparsities)

    def _ask(self, sparsities: Float64[np.ndarray, "candidates blocks 7"]) -> Float64[np.ndarray, " candidates"]:
        taus = [s.thresholds(self.exponents[b], sparsities[:, b]) for b, s in enumerate(self.calibration.statistics)]
        return self._divergence(self.exponents, np.stack(taus, axis=1))

    @cached_property
    def _divergence(self) -> DivergenceLoss:
        return DivergenceLoss(self.calibration, self.settings.block_tokens, self.settings.chunk)

    @cached_property
    def paths(self) -> list[Path]:
        """Every block's greedy path of layer sparsities, from dense to as sparse as may be, with the block errors."""
        found = []
        for b in self.progress(range(self.blocks)):
            made = self.state.keep(f"{self._prefix} path {b}", lambda b=b: self._path(b), self.spent)
            found.append(Path(made["sparsities"], made["errors"]))
        return found

    def _path(self, b: int) -> dict[str, np.ndarray]:
        loss = BlockLoss(self.calibration, b, self.settings.layer_tokens, self.settings.chunk)
        path = greedy_path(
            loss,
            self.calibration.statistics[b],
            self.exponents[b],
            self.weights,
            self.max_sparsity,
            self.settings.layer_step,
            self.max_sparsity,
        )
        self.spent.tokens += len(path.errors) * len(LAYERS) * loss.tokens
        return path._asdict()

    def on_paths(self, budgets: Float64[np.ndarray, "candidates blocks"]) -> Float64[np.ndarray, "candidates blocks 7"]:
        """The layer sparsities that block budgets get: the points of the greedy paths where they are met."""
        return np.stack([path.at(self.weights, budgets[:, b]) for b, path in enumerate(self.paths)], axis=1)

    @cached_property
    def costs(self) -> Float64[np.ndarray, "blocks 7 levels"]:
        """The second-order cost of every layer at every one of `levels`, nats per token; they add up over layers."""
        tokens = self.settings.gradient_tokens

        def make() -> dict[str, np.ndarray]:
            found = layer_costs(self.calibration, self.exponents, self.levels, tokens, self.seed)
            self.spent.tokens += 3 * tokens
            return {"costs": found}

        return self.state.keep(f"{self._prefix} costs {LEVELS}", make, self.spent)["costs"]

    def predicted(self, sparsities: Table) -> float:
        """The KL that the second-order costs add up to."""
        cells = np.ndindex(sparsities.shape)
        return float(sum(np.interp(sparsities[b, i], self.levels, self.costs[b, i]) for b, i in cells))

    def uniform(self) -> Table:
        """The target everywhere."""
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


Allocator = Callable[[BudgetProblem], Allocation]
