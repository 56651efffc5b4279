"""How much a search may spend, and which of its stages run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from wisparse_jax.errors import ConfigError
from wisparse_jax.files import read_yaml

ALGORITHMS = ("CR_FM_NES", "CMA_ES", "Sep_CMA_ES", "SNES")


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """The search's budget; the defaults suit a GPU and a model of several billion parameters.

    Windows of calibration text are dense up to their last `sparse_share` and sparse after it, as in generation,
    where the prompt is dense. The objectives are measured on the sparse positions.
    """

    window: int = 512  # tokens in a window of calibration text
    tokens: int = 16_384  # calibration text in all, tokens
    sparse_share: float = 0.5
    statistics_tokens: int = 1_024  # sparse positions whose activations are kept for the quantiles
    max_sparsity: float = 0.95  # of any layer
    # Exponents (Alg. 2 of the paper)
    search_exponents: bool = True
    exponent_step: float = 0.05
    max_exponent: float = 1.5
    exponent_passes: int = 3
    exponent_tokens: int = 2_048  # sparse positions on which block errors are measured
    # Block budgets (Alg. 3)
    search_blocks: bool = True
    algorithm: str = "CR_FM_NES"
    population: int = 32
    generations: int = 60
    initial_std: float = 0.05  # of the candidates' sparsities around uniform
    block_tokens: int = 4_096
    # Layer budgets (Alg. 4)
    search_layers: bool = True
    layer_step: float = 0.02  # sparsity that one step adds to the largest layer
    layer_tokens: int = 2_048
    # How many candidates are evaluated at once, which bounds the memory
    chunk: int = 8

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
            ConfigError: a value out of range; names the field.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool | str) and not 0 < value < float("inf"):
                raise ConfigError(f"{field.name} = {value!r}: expected a positive number")
        for name in ("sparse_share", "max_sparsity"):
            if getattr(self, name) > 1:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: expected a share, at most 1")
        if self.algorithm not in ALGORITHMS:
            raise ConfigError(f"algorithm = {self.algorithm!r}: expected one of {', '.join(ALGORITHMS)}")
        if self.population % 2 or self.population < 4:
            raise ConfigError(f"population = {self.population}: expected an even number, at least 4")
        if self.window < 2:
            raise ConfigError(f"window = {self.window}: expected at least 2 tokens")

    @property
    def exponents(self) -> tuple[float, ...]:
        """The candidate exponents, 0 to `max_exponent`."""
        count = int(self.max_exponent / self.exponent_step + 1e-9)
        return tuple(round(i * self.exponent_step, 6) for i in range(count + 1))

    def sparse_positions(self, window: int) -> int:
        """How many positions at the end of a window run sparse; at least 1."""
        return max(1, round(window * self.sparse_share))


def read_settings(path: str | Path | None) -> SearchSettings:
    """Settings from a YAML file that names the fields to change; None gives the defaults.

    Raises:
        ConfigError: not readable, not YAML, an unknown field or a bad value; names file and field.
    """
    return SearchSettings() if path is None else read_yaml(path, SearchSettings, ConfigError)
