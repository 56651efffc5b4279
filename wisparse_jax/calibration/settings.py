"""What settings are, and those of the calibration text.

A part of a search declares its settings where it is written: a small frozen dataclass from `Settings`, each field with
its bounds. `search.SearchSettings` has the fields of all parts; `of` takes a part's own out of it.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from wisparse_jax.errors import ConfigError

LARGEST = 10**8  # of a number of tokens: beyond it a search would not end in a day, or fill the memory, on any machine

S = TypeVar("S", bound="Settings")


def setting(
    default: Any,
    *,
    least: int | float | None = None,
    largest: int | float = LARGEST,
    zero: bool = False,
    share: bool = False,
    choices: Callable[[], Iterable[str]] | None = None,
    expected: tuple[str, Callable[[Any], bool]] | None = None,
) -> Any:
    """A field of settings, with what its value may be.

    Args:
        default: its value unless another is given.
        least: the smallest number that is accepted, if not any above 0.
        largest: the largest number that is accepted.
        zero: 0 is accepted too.
        share: a number up to 1.
        choices: the words that are accepted.
        expected: what is accepted, for a message, and whether a value is that.
    """
    largest = 1 if share else largest
    bounds = {"least": least, "largest": largest, "zero": zero, "share": share, "choices": choices}
    return dataclasses.field(default=default, metadata=bounds | {"expected": expected})


def switch(*choices: str) -> Any:
    """A field that puts one of the choices in place of what a method has; "method" leaves it as it is."""
    return setting("method", choices=lambda: ("method", *choices))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Some settings; all are checked when they are made."""

    def __post_init__(self) -> None:
        """Refuse values of another type or out of range.

        Raises:
            ConfigError: a value of another type or out of range; names the field.
        """
        kinds = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            if (problem := _problem(getattr(self, field.name), kinds[field.name], field.metadata)) is not None:
                raise ConfigError(f"{field.name} = {getattr(self, field.name)!r}: expected {problem}")

    @classmethod
    def of(cls: type[S], whole: Settings) -> S:
        """The fields of this kind that other settings have; its defaults for those that they lack."""
        if isinstance(whole, cls):
            return whole
        names = [field.name for field in dataclasses.fields(cls) if hasattr(whole, field.name)]
        return cls(**{name: getattr(whole, name) for name in names})


def _problem(value: Any, kind: Any, bounds: Mapping[str, Any]) -> str | None:
    """What was expected in place of a value that is refused."""
    if type(value) is not kind and not (kind is float and type(value) is int):
        return getattr(kind, "__name__", str(kind))
    if not bounds:  # a field that is not made by `setting`
        return None
    if kind in (int, float):
        if not ((bounds["zero"] and value == 0) or 0 < value < float("inf")):
            return "a positive number"
        if value > bounds["largest"]:
            return "a share, at most 1" if bounds["share"] else f"a number up to {bounds['largest']}"
        if bounds["least"] is not None and value < bounds["least"]:
            return f"a number from {bounds['least']:g} on"
    if bounds["choices"] is not None and value not in (choices := tuple(bounds["choices"]())):
        return f"one of {', '.join(choices)}"
    if bounds["expected"] is not None and not bounds["expected"][1](value):
        return bounds["expected"][0]
    return None


@dataclasses.dataclass(frozen=True)
class TextSettings(Settings):
    """Settings of the calibration text.

    Windows are dense up to their last `sparse_share` and sparse after it, as in generation, where the prompt is dense.
    The objectives are measured on the sparse positions.
    """

    # tokens in a window of calibration text
    window: int = setting(512, largest=2**24, expected=("at least 2 tokens", lambda length: length >= 2))
    tokens: int = setting(16_384)  # calibration text in all, tokens
    sparse_share: float = setting(0.5, share=True)
    # of the windows, at their end: they judge what the searches on the others found
    held_out_share: float = setting(0.125, share=True, zero=True)
    statistics_tokens: int = setting(1_024)  # sparse positions whose activations are kept for the quantiles

    def sparse_positions(self, window: int) -> int:
        """How many positions at the end of a window run sparse; at least 1."""
        return max(1, round(window * self.sparse_share))


@dataclasses.dataclass(frozen=True)
class GradientSettings(Settings):
    """Settings of the backward passes that the basis, the gains and the costs come from."""

    gradient_tokens: int = setting(16_384)  # sparse positions of a backward pass
