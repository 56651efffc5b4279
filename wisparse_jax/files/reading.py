"""Reading JSON and YAML that may be damaged or hostile: bounded in size, depth and numbers, checked in its types.

Whatever the file holds, the reader returns a value of the type asked for or raises one error of one line.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from wisparse_jax.errors import WisparseError

SMALL, LARGE = 1 << 20, 16 << 20  # bytes: a configuration; a list of all tensors of a model
SETTINGS = 64 << 10  # bytes of a YAML file, which is read far slower
DEPTH = 64
_POINTER, _LARGEST_POINTER = b"version https://git-lfs.github.com/spec/", 1024

_EXPECTED = {
    "bool_type": "true or false",
    "dataclass_type": "an object",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "an object",
    "string_type": "a string",
    "tuple_type": "a list",
}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def read_bytes(path: str | Path, error: type[WisparseError], limit: int) -> bytes:
    """The contents of a regular file of at most `limit` bytes; never waits for a pipe or reads a device.

    Raises:
        WisparseError: of the kind `error`, if the file is missing, not a regular file, too large or unreadable.
    """
    check_regular(path, error)
    try:
        # Should a pipe have taken its place meanwhile, opening it would wait for somebody to write to it.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            data = file.read(limit + 1)
    except OSError as problem:
        raise error(f"{path}: cannot be read: {_reason(problem)}") from None
    if len(data) > limit:
        raise error(f"{path}: larger than {limit:,} bytes, which no such file should be")
    return data


def check_regular(path: str | Path, error: type[WisparseError]) -> None:
    """Refuse a pipe, a device or a folder before a library opens it, and perhaps waits for ever.

    So is what only stands for a file: a link that points nowhere, and what Git leaves of a file that LFS keeps.

    Raises:
        WisparseError: of the kind `error`, if the file is missing, not a regular one, or only stands for one.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path}: not a regular file")
        if len(_POINTER) < status.st_size < _LARGEST_POINTER and _begins(path, _POINTER):
            raise error(f"{path}: a Git LFS pointer, not the file itself; fetch it, in its repository: git lfs pull")
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            target = os.readlink(path)
            raise error(
                f"{path}: a link to {target}, which is not there (an incomplete download, cache or copy?); get it again"
            ) from None
        raise error(f"{path}: no such file") from None
    except WisparseError:
        raise
    except (OSError, ValueError) as problem:  # a ValueError for a name with a NUL in it
        raise error(f"{path}: cannot be read: {_reason(problem)}") from None


def _begins(path: str | Path, start: bytes) -> bool:
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        return file.read(len(start)) == start


def read_json(path: str | Path, kind: Any, error: type[WisparseError], limit: int = SMALL) -> Any:
    """A JSON file as a value of a type that pydantic can check: a dict or list type, a dataclass, a TypedDict.

    Types are strict (`true` is no number, `"1"` neither, `1` is a float), fields that a dataclass lacks are ignored,
    whole numbers have at most 64 bits, numbers are finite.

    Raises:
        WisparseError: of the kind `error`: the file cannot be read, is not JSON, or holds another type; names the file
            and the field.
    """
    from pydantic_core import from_json

    data = read_bytes(path, error, limit)
    try:
        raw = from_json(data, allow_inf_nan=False)
    except ValueError as problem:
        raise error(f"{path}: not readable as JSON: {problem}") from None
    if problem := next(_problems(raw), None):
        raise error(f"{path}: {problem}")
    return _checked(path, raw, data, kind, error, "ignore")


def read_yaml(path: str | Path, kind: Any, error: type[WisparseError]) -> Any:
    """A YAML file as `read_json` reads JSON; unknown fields are refused, anchors too, and an empty file is `{}`.

    Scalars are those of YAML 1.2: `010` is ten, and `1:30`, `off` and `2026-01-01` are text. A key given twice is
    refused.

    Raises:
        WisparseError: of the kind `error`, as in `read_json`.
    """
    import yaml
    from pydantic_core import to_json

    data = read_bytes(path, error, SETTINGS)
    try:
        _check_events(yaml.parse(data, yaml.SafeLoader))
        raw = yaml.load(data, _scalars_of_yaml_1_2())
    except Exception as problem:  # PyYAML lets every kind through: ValueError, KeyError, IndexError, OverflowError
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise error(f"{path}: not readable as YAML: {reason}") from None
    raw = {} if raw is None else raw
    # NaN and infinity are for the settings to judge, which know the range of each field.
    if problem := next(_problems(raw, finite=False), None):
        raise error(f"{path}: {problem}")
    return _checked(path, raw, to_json(raw, inf_nan_mode="constants"), kind, error, "forbid")


def shown(value: Any) -> str:
    """A value of a file for a message: its repr, cut where it is long."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # a whole number with more digits than Python prints
        return f"a whole number of {value.bit_length()} bits"


def _checked(path: str | Path, raw: Any, data: bytes, kind: Any, error: type[WisparseError], extra: Any) -> Any:
    import pydantic

    try:
        return pydantic.TypeAdapter(kind).validate_json(data, strict=True, extra=extra)
    except pydantic.ValidationError as problem:
        errors: list[Any] = problem.errors(include_url=False)
    first = errors[0]
    if first["type"] == "value_error":
        raise error(f"{path}: {first['ctx']['error']}")
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        names = ", ".join(sorted(f.name for f in dataclasses.fields(kind))) if dataclasses.is_dataclass(kind) else ""
        raise error(f"{path}: unknown field {_field(first['loc'])!r}; expected some of {names}")
    if first["type"] == "missing":
        raise error(f"{path}: {_field(first['loc'])}: expected a value, found nothing")
    # A value that may be of several types has an error for each: that which came furthest is meant.
    places = [_inside(raw, e["loc"]) for e in errors]
    place, value = max(places, key=lambda found: len(found[0]))
    same = [e for e, found in zip(errors, places, strict=True) if found[0] == place]
    expected = " or ".join(dict.fromkeys(_EXPECTED.get(e["type"]) or _without_subject(e["msg"]) for e in same))
    if not place:
        raise error(f"{path}: expected {expected}, found {shown(value)}")
    raise error(f"{path}: {_field(place)} = {shown(value)}: expected {expected}")


def _inside(raw: Any, where: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
    """The place in the file and the value there; pydantic's own has names of types in between."""
    place = []
    for key in where:
        if (isinstance(raw, dict) and key in raw) or (isinstance(raw, list) and isinstance(key, int)):
            raw = raw[key]
            place.append(key)
    return tuple(place), raw


def _without_subject(message: str) -> str:
    return message.removeprefix("Input should be ")


def _problems(raw: Any, finite: bool = True) -> Iterator[str]:
    """What is wrong with the values of a parsed file, without recursion."""
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), raw)]
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, dict | list) and len(where) >= DEPTH:
            yield f"nested deeper than {DEPTH} levels"
        elif any(isinstance(text, str) and not _is_unicode(text) for text in (value, *where[-1:])):
            yield f"{_field(where)}: a lone surrogate, which is no character"
        elif isinstance(value, dict):
            waiting += [((*where, key), entry) for key, entry in value.items()]
        elif isinstance(value, list):
            waiting += [((*where, i), entry) for i, entry in enumerate(value)]
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            yield f"{_field(where)}: a whole number beyond 64 bits"
        elif isinstance(value, float) and finite and not math.isfinite(value):
            yield f"{_field(where)}: a number beyond the range of float64"
        elif not isinstance(value, str | int | float | None):
            yield f"{_field(where)}: expected text, a number, true or false, found a {type(value).__name__}"


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _check_events(events: Any) -> None:
    """Refuse anchors, by which a short file grows without bound, and nesting that PyYAML would recurse into."""
    import yaml

    depth = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"anchors and aliases are not supported (*{event.anchor})")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise ValueError(f"nested deeper than {DEPTH} levels")


@functools.cache
def _scalars_of_yaml_1_2() -> Any:
    """PyYAML's safe loader, which takes `010` for 8, `1:30` for 90, `off` for false, and the last of two equal keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[Any] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"{shown(twice[0])} is given twice, at or below line {node.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    def whole_number(loader: Any, node: Any) -> int:
        text = loader.construct_scalar(node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    for tag, pattern, first in _SCALARS:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), list(first))
    Loader.add_constructor("tag:yaml.org,2002:int", whole_number)
    return Loader


# What a plain scalar of YAML 1.2's core schema is, and the characters that it may begin with.
_SCALARS = (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


def _field(where: tuple[Any, ...]) -> str:
    """A place in a file, such as `blocks[3].q.threshold`."""
    parts = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in where)
    return "".join(parts).removeprefix(".")


def _reason(problem: OSError | ValueError) -> str:
    return getattr(problem, "strerror", None) or str(problem)
