"""The methods: each is a list of stages, through one code path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TypeVar

from wisparse_jax.calibration.settings import Settings
from wisparse_jax.errors import WisparseError
from wisparse_jax.search.allocators import get_allocator
from wisparse_jax.search.problem import Allocation, BudgetProblem
from wisparse_jax.search.stages import (
    STAGES,
    Basis,
    Budgets,
    Comparison,
    DenseRun,
    Exponents,
    FinalExponents,
    FinalThresholds,
    PlaneBudgets,
    Planes,
    Score,
    Stage,
    Training,
)

FORMAT = "int2+2+2+2"  # of weights in planes
S = TypeVar("S", bound=Stage)


@dataclasses.dataclass(frozen=True)
class Method:
    """How a plan is found: stages, in the order in which they run, between the dense run and the thresholds."""

    name: str
    summary: str
    stages: tuple[Stage, ...]

    def stage(self, kind: type[S]) -> S:
        """Its first stage of a kind.

        Raises:
            WisparseError: it has none.
        """
        for stage in self.stages:
            if isinstance(stage, kind):
                return stage
        raise WisparseError(f"{self.name}: has no stage {kind.__name__}")

    @property
    def all_stages(self) -> tuple[Stage, ...]:
        """The stages from first to last, with those that every search has."""
        return (DenseRun(), *self.stages, FinalThresholds(), Comparison())


Choice = str | Method | Callable[[BudgetProblem], Allocation]


def parts(
    basis: str = "none",
    gains: str = "norms",
    exponent: float = 0.0,
    allocator: str | Callable[[BudgetProblem], Allocation] = "uniform",
    biases: bool = False,
    search_exponents: bool = False,
) -> tuple[Stage, ...]:
    """The stages of a choice of parts.

    Args:
        basis: what the model is folded into: none, eigen or refined.
        gains: what counts a channel in the score: norms, gradients, or trained ones, which start from gradients.
        exponent: every layer's alpha, or where the search of exponents starts.
        allocator: how the budget is spread.
        biases: whether constant vectors are trained in place of what is skipped.
        search_exponents: whether exponents are searched, before the budgets and after them.
    """
    return (
        Basis(basis),
        Score(gains, exponent, start=search_exponents),
        *(Exponents(),) * search_exponents,
        Budgets(get_allocator(allocator)),
        *(FinalExponents(),) * search_exponents,
        Training(gains == "trained", biases),
    )


METHODS = {
    method.name: method
    for method in (
        Method(
            "wisparse-plus",
            "refined basis, second-order budgets over all layers, scores by gradients, trained then, and biases",
            parts(basis="refined", gains="trained", exponent=1.0, allocator="second-order", biases=True),
        ),
        Method(
            "planes",
            "weights in nested planes of 2 bits, of which each channel is read as many as its activation asks for: "
            "gradient scores and second-order budgets of every plane of every layer, in a basis refined for it",
            (Basis("refined", FORMAT), Planes(FORMAT), PlaneBudgets()),
        ),
        Method(
            "grinqh",
            "weights in the same planes by activation magnitude, one share a plane for all layers, after GRINQH",
            (Planes(FORMAT, magnitudes=True), PlaneBudgets()),
        ),
        Method(
            "wisparse",
            "the paper's: searched exponents, evolved block budgets, each candidate with its layer budgets",
            parts(search_exponents=True, allocator="evolution"),
        ),
        Method(
            "wisparse-paper",
            "the paper to the letter: block budgets by 400 generations of integer moves, layers equal meanwhile",
            parts(search_exponents=True, allocator="paper"),
        ),
        Method(
            "teal", "activation magnitude, greedy layer budgets in blocks of equal sparsity", parts(allocator="greedy")
        ),
        Method(
            "wina",
            "activation times weight norm, layer budgets as TEAL's",
            parts(exponent=1.0, allocator="greedy"),
        ),
        Method("uniform", "activation magnitude, the same sparsity everywhere", parts()),
    )
}
DEFAULT = "wisparse-plus"
PLANES = "planes"  # where bits are asked for


def get_method(choice: Choice) -> Method:
    """The method of that name; a method itself; or, of an allocator, the default method with it.

    Raises:
        WisparseError: no such method.
    """
    if isinstance(choice, Method):
        return choice
    if not isinstance(choice, str):
        allocator = get_allocator(choice)
        stages = (Budgets(allocator) if isinstance(stage, Budgets) else stage for stage in METHODS[DEFAULT].stages)
        return Method(allocator.name, f"{DEFAULT} with budgets by {allocator.name}", tuple(stages))
    if choice not in METHODS:
        raise WisparseError(f"method = {choice!r}: expected one of {', '.join(METHODS)}")
    return METHODS[choice]


def resolve(choice: Choice, settings: Settings) -> Method:
    """The method with its stages as the settings have them, by a name that says which parts these switched.

    Raises:
        WisparseError: no such method, or a switch that none of its stages knows.
    """
    method = get_method(choice)
    known = {name for stage in method.stages for name in stage.switches}
    for name in switches():
        if (value := getattr(settings, name, "method")) != "method" and name not in known:
            raise WisparseError(f"{name} = {value!r}: expected method, as {method.name} has no stage that it switches")
    stages = tuple(stage.configured(settings) for stage in method.stages)
    before, now = _switched(method.stages), _switched(stages)
    others = ", ".join(f"{part.replace('_', ' ')} {value}" for part, value in now.items() if value != before.get(part))
    return dataclasses.replace(method, name=f"{method.name} ({others})" if others else method.name, stages=stages)


def _switched(stages: Iterable[Stage]) -> dict[str, str]:
    return {part: value for stage in stages for part, value in stage.switched.items()}


def switches() -> tuple[str, ...]:
    """The fields of the settings that switch parts of a method one by one."""
    return tuple(dict.fromkeys(name for kind in STAGES for name in kind.switches))
