"""How options read in a command's help: no `{None}|STR`, and no default where there is none."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from wisparse_jax.files.paths import expanded

T = TypeVar("T")


def _default(label: str) -> str:
    return "" if label in ("", "None", "False") else f"(default: {label})"


# An option that may be left out, or a switch: what it is without stands in its description.
Unset = Annotated[T, tyro.conf.arg(help_behavior_hint=_default)]
# A positional argument is called by its name, and a switch has one form.
STYLE = (tyro.conf.PositionalMetavarFromFieldName, tyro.conf.FlagCreatePairsOff)
REGISTRY = ConstructorRegistry()


class NotANumberError(Exception):
    """A word that is no number; not a ValueError, of which tyro says for a list that there is no valid parse."""


@REGISTRY.primitive_rule
def _number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """A number, of which a percentage is none; -0.0 is 0.0, as it prints."""
    if info.type is not float:
        return None

    def read(words: list[str]) -> float:
        try:
            return float(words[0]) + 0.0
        except ValueError:
            hint = ""
            with contextlib.suppress(ValueError):
                hint = f" (did you mean {float(words[0].removesuffix('%')) / 100:g}?)"
            raise NotANumberError(words[0], f"expected a number{hint}") from None

    return PrimitiveConstructorSpec(
        nargs=1, metavar="FLOAT", instance_from_str=read,
        is_instance=lambda value: isinstance(value, int | float), str_from_instance=lambda value: [str(value)],
    )  # fmt: skip


@REGISTRY.primitive_rule
def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """A path, of which no shell has expanded the ~, as in `--out=~/plan`."""
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1, metavar="PATH", instance_from_str=lambda words: expanded(words[0]),
        is_instance=lambda value: isinstance(value, Path), str_from_instance=lambda value: [str(value)],
    )  # fmt: skip


@REGISTRY.primitive_rule
def _value_or_none(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """A value that may be left out is read like any other: the word None is no value."""
    parts = typing.get_args(info.type)
    if typing.get_origin(info.type) not in (typing.Union, types.UnionType) or type(None) not in parts:
        return None
    [inner] = [part for part in parts if part is not type(None)]
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(inner, set(info.markers)))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return dataclasses.replace(
        spec,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
    )
