"""The ways to spread a budget, by name: each registers itself where it is written, which may be a user's file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from wisparse_jax.calibration.settings import Settings
from wisparse_jax.errors import WisparseError
from wisparse_jax.search.problem import Allocation, BudgetProblem

Function = Callable[[BudgetProblem], Allocation]
Evidence = Literal["paths", "costs"]


def _nothing(settings: Settings) -> float:
    return 0.0


@dataclasses.dataclass(frozen=True)
class Allocator:
    """A way to spread a budget.

    `starts_from` names the allocator whose result is held against this one's on windows that are held out, and stays
    where it loses less there; without, the result is taken as it is. For forecasts: `asks` is what it asks of a problem
    that serves every target, `tokens` what it forwards beside that for each target.
    """

    name: str
    function: Function = dataclasses.field(repr=False)
    starts_from: str | None = None
    asks: tuple[Evidence, ...] = ()
    tokens: Callable[[Settings], float] = dataclasses.field(default=_nothing, repr=False)

    def __call__(self, problem: BudgetProblem) -> Allocation:
        """The budget of a problem."""
        return self.function(problem)


ALLOCATORS: dict[str, Allocator] = {}


def allocator(
    name: str,
    starts_from: str | None = None,
    asks: tuple[Evidence, ...] = (),
    tokens: Callable[[Settings], float] = _nothing,
) -> Callable[[Function], Function]:
    """Register the function below as the allocator of that name; the rest as in `Allocator`.

    Raises:
        WisparseError: the name is another function's.
    """

    def register(function: Function) -> Function:
        known = ALLOCATORS.get(name)
        if known is not None and _place(known.function) != _place(function):
            raise WisparseError(f"allocator = {name!r}: is the name of {_place(known.function)}")
        ALLOCATORS[name] = Allocator(name, function, starts_from, asks, tokens)
        return function

    return register


def get_allocator(choice: str | Function) -> Allocator:
    """The allocator of that name, or of a function that need not be registered.

    Raises:
        WisparseError: no such allocator.
    """
    if isinstance(choice, Allocator):
        return choice
    if not isinstance(choice, str):
        same = [known for known in ALLOCATORS.values() if known.function is choice]
        return same[0] if same else Allocator(getattr(choice, "__name__", type(choice).__name__), choice)
    if choice not in ALLOCATORS:
        raise WisparseError(f"allocator = {choice!r}: expected one of {', '.join(ALLOCATORS)}")
    return ALLOCATORS[choice]


def _place(function: Function) -> str:
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}.{kind.__qualname__}"
