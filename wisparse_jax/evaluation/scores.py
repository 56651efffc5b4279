"""What was measured on windows of text, as means with their standard errors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float64

from wisparse_jax.models.config import LAYERS


@dataclasses.dataclass(frozen=True, eq=False)
class Figure:
    """A mean over windows and its standard error, nan where one window leaves it unknown."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:z.4g}{self._error('.2g')}"

    def __format__(self, spec: str) -> str:
        """Both numbers as `spec` says, such as `.4f`; a sign, as in `+.4f`, is the mean's, and zero has no minus."""
        if not spec:
            return str(self)
        digits = spec.removeprefix("+")
        return f"{self.mean:{'+' * (digits != spec)}z{digits}}{self._error(digits)}"

    def _error(self, spec: str) -> str:
        return "" if math.isnan(self.error) else f" ± {self.error:{spec}}"

    @staticmethod
    def over(windows: Float64[np.ndarray, " windows"]) -> Figure:
        """The mean of one value per window, with the standard error of that mean (nan for a single window)."""
        n = len(windows)
        return Figure(float(windows.mean()), float(windows.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan)


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """How a model predicted each window's scored positions: mean negative log-likelihood, nats per token."""

    nll: Float64[np.ndarray, " windows"]

    @property
    def perplexity(self) -> Figure:
        """`exp` of the mean negative log-likelihood; its error by the delta method. Infinite beyond float64."""
        nll = Figure.over(self.nll)
        mean = math.exp(nll.mean) if nll.mean < 709 else math.inf
        return Figure(mean, mean * nll.error)


@dataclasses.dataclass(frozen=True, eq=False)
class SparseScore(Score):
    """The same for a sparse model, with its KL(dense || sparse) in nats per token and its realised sparsity."""

    window_kl: Float64[np.ndarray, " windows"]
    token_sparsity: Float64[np.ndarray, "windows positions"]
    layer_sparsity: Float64[np.ndarray, "blocks 7"]

    @property
    def kl(self) -> Figure:
        """Mean KL(dense || sparse) per token."""
        return Figure.over(self.window_kl)

    @property
    def sparsity(self) -> Figure:
        """Realised sparsity, weighted by parameter count: mean over tokens and its standard error over windows."""
        return Figure.over(self.token_sparsity.mean(axis=1))


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """The scores of the dense model and of each plan on the same windows."""

    dense: Score
    sparse: dict[str, SparseScore]
    scored_positions: int  # per window
    window: int
    sparse_prefill: float
    # Of plans with a rival: its name, and their scores with all thresholds times the factor that brings what they skip
    # to the share that the rival skips on these windows.
    rivals: dict[str, str] = dataclasses.field(default_factory=dict)
    matched: dict[str, SparseScore] = dataclasses.field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """How many positions were scored."""
        return len(self.dense.nll) * self.scored_positions

    def common_rival(self, first: str, second: str) -> str | None:
        """Of two plans the one that is the other's rival, or the rival of both, at whose share both were scored."""
        own, other = self.rivals.get(first, first), self.rivals.get(second, second)
        return own if own == other else None

    def paired(self, first: str, second: str) -> Figure:
        """The mean difference in KL, first minus second, over the same windows, with its standard error.

        At the share of their common rival; without one at what each skips.
        """
        known = self.sparse if self.common_rival(first, second) is None else self.sparse | self.matched
        return Figure.over(known[first].window_kl - known[second].window_kl)

    def ratio(self, name: str) -> float:
        """A plan's KL at its rival's share, of the rival's; nan for a plan without one."""
        if name not in self.rivals:
            return math.nan
        return self.matched[name].kl.mean / self.sparse[self.rivals[name]].kl.mean

    def as_json(self, name: str | None = None) -> dict[str, Any]:
        """The dense figures and, for one plan, the sparse ones; numbers that are not finite become null."""
        dense = self.dense.perplexity
        out: dict[str, Any] = {"dense_perplexity": dense.mean, "dense_perplexity_error": dense.error}
        if name is not None:
            score = self.sparse[name]
            for key, figure in (
                ("perplexity", score.perplexity),
                ("kl", score.kl),
                ("sparsity", score.sparsity),
            ):
                out |= {key: figure.mean, f"{key}_error": figure.error}
            if name in self.rivals:
                at = self.matched[name]
                out |= {"rival": self.rivals[name], "sparsity_at_rival": at.sparsity.mean}
                out |= {"kl_at_rival": at.kl.mean, "kl_at_rival_error": at.kl.error}
                out["kl_of_rival"] = self.ratio(name)
            out["sparsity_spread"] = float(score.token_sparsity.std())
            out["layer_sparsity"] = [dict(zip(LAYERS, row, strict=True)) for row in score.layer_sparsity.tolist()]
        out |= {
            "tokens": self.tokens,
            "windows": len(self.dense.nll),
            "window": self.window,
            "sparse_prefill": self.sparse_prefill,
        }
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in out.items()}
