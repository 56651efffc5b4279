"""How much a search may spend, and which of its stages run."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

from wisparse_jax.errors import ConfigError
from wisparse_jax.files import read_yaml
from wisparse_jax.sparsity.methods import BASES, GAINS

MAY_BE_ZERO = ("held_out_share", "absolute_steps", "skipped_steps", "heads_steps", "training_steps")
SHARES = ("sparse_share", "max_sparsity", "held_out_share", "basis_sparsity", "layer_step", "initial_std")
# Beyond these a search would not end in a day, or fill the memory, on any machine.
LARGEST = {
    "window": 2**24,
    "max_exponent": 16,
    **dict.fromkeys(("basis_rate", "gain_rate", "bias_rate"), 1),
    **dict.fromkeys(("population", "paper_offspring", "chunk"), 2**14),
    **dict.fromkeys(("generations", "paper_generations", "exponent_passes"), 10**5),
    **dict.fromkeys(("absolute_steps", "skipped_steps", "heads_steps", "training_steps", "training_every"), 10**6),
    **dict.fromkeys(SHARES, 1),
}
LARGEST_TOKENS = 10**8
SMALLEST = {"exponent_step": 1e-3, "layer_step": 1e-4}
ALGORITHMS = ("CR_FM_NES", "CMA_ES", "Sep_CMA_ES", "SNES")


# What a method chooses can be switched one by one; "method" leaves it as it is.
SWITCHES = {
    "basis": BASES,
    "gains": GAINS,
    "allocator": ("uniform", "greedy", "evolution", "evolution-equal-layers", "paper", "second-order"),
    "biases": ("on", "off"),
}


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """The search's budget; the defaults suit a GPU and a model of several billion parameters.

    Windows of calibration text are dense up to their last `sparse_share` and sparse after it, as in generation,
    where the prompt is dense. The objectives are measured on the sparse positions.
    """

    window: int = 512  # tokens in a window of calibration text
    tokens: int = 16_384  # calibration text in all, tokens
    sparse_share: float = 0.5
    held_out_share: float = 0.125  # of the windows, at their end: they judge what the searches on the others found
    statistics_tokens: int = 1_024  # sparse positions whose activations are kept for the quantiles
    max_sparsity: float = 0.95  # of any layer
    chunk: int = 8  # candidates that are evaluated at once on each device, which bounds the memory
    compare_teal: bool = True  # a plan's held-out figures stand beside TEAL's too, whose search then runs as well
    # Parts of the method, to switch them one by one
    basis: str = "method"
    gains: str = "method"
    allocator: str = "method"
    biases: str = "method"
    search_exponents: bool = True
    # Basis
    basis_sparsity: float = 0.5  # what the basis is refined for, whatever the target, so that targets share it
    absolute_steps: int = 300
    skipped_steps: int = 1_000
    heads_steps: int = 300
    basis_rate: float = 0.01
    # Gradients: sparse positions of a backward pass, for the gains, the costs and the basis
    gradient_tokens: int = 16_384
    # Gains and biases trained on KL
    training_steps: int = 300
    training_tokens: int = 2_048  # sparse positions of a step
    training_every: int = 25
    gain_rate: float = 0.005
    bias_rate: float = 0.0005
    # Exponents (Alg. 2 of the paper)
    exponent_step: float = 0.05
    max_exponent: float = 1.5
    exponent_passes: int = 3
    exponent_tokens: int = 2_048  # sparse positions on which block errors are measured
    # Block budgets (Alg. 3)
    algorithm: str = "CR_FM_NES"
    population: int = 32
    generations: int = 60
    initial_std: float = 0.05  # of the candidates' sparsities around uniform
    paper_generations: int = 400
    paper_offspring: int = 64
    block_tokens: int = 4_096
    # Layer budgets (Alg. 4)
    layer_step: float = 0.02  # sparsity that one step adds to the largest layer
    layer_tokens: int = 2_048

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
            ConfigError: a value of another type or out of range; names the field.
        """
        kinds = typing.get_type_hints(SearchSettings)
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), kinds[field.name]
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ConfigError(f"{field.name} = {value!r}: expected {kind.__name__}")
            least = 0 if field.name in MAY_BE_ZERO else None
            if kind in (int, float) and not (value == least or 0 < value < float("inf")):
                raise ConfigError(f"{field.name} = {value!r}: expected a positive number")
            if kind in (int, float) and value > (largest := LARGEST.get(field.name, LARGEST_TOKENS)):
                what = "a share, at most 1" if field.name in SHARES else f"a number up to {largest}"
                raise ConfigError(f"{field.name} = {value!r}: expected {what}")
            if field.name in SMALLEST and value < (smallest := SMALLEST[field.name]):
                raise ConfigError(f"{field.name} = {value!r}: expected a number from {smallest:g} on")
        for name, choices in SWITCHES.items():
            if getattr(self, name) not in ("method", *choices):
                raise ConfigError(f"{name} = {getattr(self, name)!r}: expected one of method, {', '.join(choices)}")
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
