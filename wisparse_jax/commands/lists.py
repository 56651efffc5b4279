"""Options that take several values, which may follow one another, as in `--plan A B`, or come one by one."""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Sequence
from typing import Any

from tyro.conf import Positional, UseAppendAction

from wisparse_jax.errors import WisparseError


def _mark(kind: Any) -> Any:
    return kind[int].__metadata__[0]


_POSITIONAL, _APPENDED = _mark(Positional), _mark(UseAppendAction)


def lists_of(command: type) -> dict[str, bool]:
    """The options of a command that take several values, and whether its parser wants each value with its option."""
    lists = {}
    for name, hint in typing.get_type_hints(command, include_extras=True).items():
        kind, *marks = (hint.__origin__, *hint.__metadata__) if hasattr(hint, "__metadata__") else (hint,)
        if typing.get_origin(kind) is tuple and _POSITIONAL not in marks:
            lists[f"--{name.replace('_', '-')}"] = _APPENDED in marks
    return lists


def listed(command: type, args: Sequence[str]) -> list[str]:
    """The words after a command's name with each list as its parser wants it, however it was written.

    Where no argument stands before the options, the last word of a list may be one: lists are left as they are.

    Raises:
        WisparseError: a list without a value.
    """
    if not args or args[0].startswith("-"):
        return list(args)
    lists = lists_of(command)
    collected: dict[str, list[list[str]]] = {}
    others: list[str] = []
    values: list[str] | None = None  # of the list whose words these are
    for word in args:
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name in lists:
            values = [value] if equals else []
            collected.setdefault(name, []).append(values)
        elif values is None or (word.startswith("-") and not _is_number(word)):
            values = None
            others.append(word)
        else:
            values.append(word)
    for name, occurrences in collected.items():
        if not all(occurrences):
            raise WisparseError(f"{name}: expected a value, found none")
        every = [value for values in occurrences for value in values]
        others += [f"{name}={value}" for value in every] if lists[name] else [name, *every]
    return others


def _is_number(word: str) -> bool:
    with contextlib.suppress(ValueError):
        float(word)
        return True
    return False
