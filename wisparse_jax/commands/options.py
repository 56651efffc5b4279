"""How options read in a command's help: no `{None}|STR`, and no default where there is none."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Annotated, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

T = TypeVar("T")


def _default(label: str) -> str:
    return "" if label in ("", "None", "False") else f"(default: {label})"


# An option that may be left out, or a switch: what it is without stands in its description.
Unset = Annotated[T, tyro.conf.arg(help_behavior_hint=_default)]
# A positional argument is called by its name, and a switch has one form.
STYLE = (tyro.conf.PositionalMetavarFromFieldName, tyro.conf.FlagCreatePairsOff)
REGISTRY = ConstructorRegistry()


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
