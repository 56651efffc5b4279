"""Whatever a JSON or YAML file holds: a value of the right type, or one clean line that names the file."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from wisparse_jax.errors import ConfigError, PlanError, WisparseError
from wisparse_jax.files import check_regular, read_bytes, read_json, read_yaml, reading, shown


@dataclasses.dataclass(frozen=True)
class Inner:
    sizes: list[int]
    name: str = "x"


@dataclasses.dataclass(frozen=True)
class Outer:
    count: int
    share: float = 0.5
    flag: bool = False
    inner: dict[str, Inner] = dataclasses.field(default_factory=dict)
    ids: int | list[int] | None = None
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"count = {self.count}: expected 0 or above")


def write(tmp_path: Path, text: str | bytes, name: str = "file") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(read: Any, path: Path, *args: Any) -> str:
    with pytest.raises(PlanError) as caught:
        read(path, *args)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) <= 1_100
    return message.removeprefix(f"{path}: ")


def test_a_value_of_the_type_asked_for(tmp_path: Path) -> None:
    raw = {"count": 3, "share": 1, "inner": {"a": {"sizes": [1, 2], "later": None}}, "unknown": [1.5]}
    path = write(tmp_path, json.dumps(raw))
    found = read_json(path, Outer, PlanError)
    assert found == Outer(3, 1.0, False, {"a": Inner([1, 2])}) and type(found.share) is float
    assert read_json(path, dict[str, Any], PlanError) == raw


TYPES = {
    '{"count": true}': "count = True: expected a whole number",
    '{"count": 1.0}': "count = 1.0: expected a whole number",
    '{"count": "1"}': "count = '1': expected a whole number",
    '{"share": 1}': "count: expected a value, found nothing",
    '{"count": 1, "share": "0.5"}': "share = '0.5': expected a number",
    '{"count": 1, "share": false}': "share = False: expected a number",
    '{"count": 1, "flag": 1}': "flag = 1: expected true or false",
    '{"count": 1, "inner": []}': "inner = []: expected an object",
    '{"count": 1, "inner": {"a": {}}}': "inner.a.sizes: expected a value, found nothing",
    '{"count": 1, "inner": {"a": {"sizes": [1, null]}}}': "inner.a.sizes[1] = None: expected a whole number",
    '{"count": 1, "inner": {"a": {"sizes": [], "name": 7}}}': "inner.a.name = 7: expected a string",
    '{"count": 1, "ids": "x"}': "ids = 'x': expected a whole number or a list",
    '{"count": 1, "ids": [1, true]}': "ids[1] = True: expected a whole number",
    '{"count": 1, "kind": "c"}': "kind = 'c': expected 'a' or 'b'",
    '{"count": -1}': "count = -1: expected 0 or above",
    "[]": "expected an object, found []",
    "null": "expected an object, found None",
}


@pytest.mark.parametrize("text", TYPES)
def test_another_type_is_named_with_its_field(tmp_path: Path, text: str) -> None:
    assert refused(read_json, write(tmp_path, text), Outer, PlanError) == TYPES[text]


HOSTILE: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "not readable as JSON: "),
    "cut": ('{"count": 1', "not readable as JSON: "),
    "two": ("{} {}", "not readable as JSON: "),
    "NaN": ('{"count": NaN}', "not readable as JSON: "),
    "not UTF-8": (b'{"\xff": 1}', "not readable as JSON: "),
    "lone surrogate": ('{"a": "\\ud800"}', "not readable as JSON: "),
    "raw control character": ('{"a": "\x1b[2J"}', "not readable as JSON: "),
    "400 digits": ('{"count": ' + "1" * 400 + "}", "count: a whole number beyond 64 bits"),
    "5000 digits": ('{"count": ' + "1" * 5000 + "}", "not readable as JSON: number out of range"),
    "beyond float64": ('{"a": [1e400]}', "a[0]: a number beyond the range of float64"),
    "nested lists": ("[" * 100_000, "not readable as JSON: recursion limit exceeded"),
    "nested objects": ('{"a":' * 100_000, "not readable as JSON: recursion limit exceeded"),
    "rather nested": ("[" * 100 + "]" * 100, "nested deeper than 64 levels"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_json(tmp_path: Path, case: str) -> None:
    text, message = HOSTILE[case]
    path = write(tmp_path, text)
    for kind in (Outer, dict[str, Any], list[Any]):
        assert refused(read_json, path, kind, PlanError).startswith(message)


def test_control_characters_of_a_valid_file_are_escaped_and_long_values_cut(tmp_path: Path) -> None:
    raw = {"count": "\n\x1b[2J\u2028" + "x" * 100_000}
    message = refused(read_json, write(tmp_path, json.dumps(raw)), Outer, PlanError)
    assert message.startswith("count = '\\n\\x1b[2J\\u2028xxx") and len(message) < 150
    message = refused(read_json, write(tmp_path, json.dumps({"count": 1, "inner": {"\n\x1b": 1}})), Outer, PlanError)
    assert message == "inner.\\n\\x1b = 1: expected an object"


def test_errors_are_one_printable_line() -> None:
    assert str(WisparseError("a\nb\t\x1b[0m \ud800 é ±")) == "a\\nb\\t\\x1b[0m \\ud800 é ±"
    long = str(ConfigError("start" + "x" * 10_000 + "end"))
    assert len(long) < 1_010 and long.startswith("startx") and long.endswith("xend")


def test_shown_is_short_whatever_it_shows() -> None:
    assert shown("a") == "'a'" and len(shown("a" * 1000)) == 80
    assert len(shown(list(range(1000)))) < 80 and len(shown({"a" * 99: ["b" * 99] * 99})) < 900
    assert shown(10**10_000) == "a whole number of 33220 bits"


def test_a_settings_file(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, "count: 3\nshare: 1\n"), Outer, PlanError) == Outer(3, 1.0)
    assert read_yaml(write(tmp_path, "# nothing\n"), dict[str, int], PlanError) == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("-010", -10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1e-3", 1e-3),
        (".5", 0.5),
        ("3", 3),
        ("true", True),
        ("off", "off"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("'3'", "3"),
        ("~", None),
        ("", None),
    ],
)
def test_scalars_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: Any) -> None:
    (found,) = read_yaml(write(tmp_path, f"a: {text}"), dict[str, Any], PlanError).values()
    assert found == value and type(found) is type(value)


YAML: dict[str, tuple[str | bytes, str]] = {
    "cut": ("a: [", "not readable as YAML: "),
    "not UTF-8": (b"a: \xff", "not readable as YAML: "),
    "!!int": ("count: !!int abc", "not readable as YAML: "),
    "!!bool": ("count: !!bool abc", "not readable as YAML: "),
    "!!float": ("count: !!float abc", "not readable as YAML: "),
    "no int": ("count: !!int ''", "not readable as YAML: "),
    "a date is text": ("count: 2001-09-09", "count = '2001-09-09': expected a whole number"),
    "minutes are text": ("count: 1:30", "count = '1:30': expected a whole number"),
    "off is text": ("count: off", "count = 'off': expected a whole number"),
    "a key twice": ("count: 1\ncount: 2", "not readable as YAML: 'count' is given twice"),
    "a key twice, below": ("a: {b: 1, 'b': 2}", "not readable as YAML: 'b' is given twice"),
    "sexagesimal": ("count: !!int 1:", "not readable as YAML: "),
    "5000 digits": ("count: " + "1" * 5000, "not readable as YAML: "),
    "400 digits": ("count: " + "1" * 400, "count: a whole number beyond 64 bits"),
    "a date": ("count: !!timestamp 2001-09-09", "count: expected text, a number, true or false, found a date"),
    "bytes": ("count: !!binary aGk=", "count: expected text, a number, true or false, found a bytes"),
    "a set": ("count: !!set {a}", "count: expected text, a number, true or false, found a set"),
    "an object of Python": ("count: !!python/object:os.system {}", "not readable as YAML: "),
    "nested": ("a: " + "[" * 10_000, "not readable as YAML: nested deeper than 64 levels"),
    "nested blocks": ("- " * 10_000, "not readable as YAML: nested deeper than 64 levels"),
    "aliases": ("a: &a [1]\nb: [*a, *a]", "not readable as YAML: anchors and aliases are not supported (*a)"),
    "merges": ("a: &a {b: 1}\n<<: *a", "not readable as YAML: anchors and aliases are not supported (*a)"),
    "control characters": ("count: \x1b[2J", "not readable as YAML: "),
    "lone surrogate": ('count: "\\ud800"', "count: a lone surrogate, which is no character"),
    "lone surrogate in a name": ('"a\\udfff": 1', "a\\udfff: a lone surrogate, which is no character"),
    "escaped ones": ('count: "\\e[2J"', "count = '\\x1b[2J': expected a whole number"),
    "unknown": (
        'count: 1\n"o\\nther": 1',
        "unknown field 'o\\nther'; expected some of count, ",
    ),
    "a list": ("- 1", "expected an object, found [1]"),
    "large": ("#" * 100_000, "larger than 65,536 bytes, which no such file should be"),
}


@pytest.mark.parametrize("case", YAML)
def test_hostile_yaml(tmp_path: Path, case: str) -> None:
    text, message = YAML[case]
    assert refused(read_yaml, write(tmp_path, text), Outer, PlanError).startswith(message)


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "link"):
        assert refused(read_json, tmp_path / name, dict, PlanError) == "not a regular file"
        assert refused(check_regular, tmp_path / name, PlanError) == "not a regular file"


@pytest.mark.parametrize("read", [lambda path, error: read_json(path, dict, error), check_regular])
def test_what_cannot_be_opened(tmp_path: Path, read: Any) -> None:
    (tmp_path / "file").write_text("{}")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert refused(read, tmp_path / "none", PlanError) == "no such file"
    assert refused(read, tmp_path / "dangling", PlanError).startswith(
        f"a link to {tmp_path}/nowhere, which is not there"
    )
    assert refused(read, tmp_path / "file" / "below", PlanError) == "no such file"
    assert refused(read, tmp_path / "loop", PlanError).startswith("cannot be read: ")
    # Python 3.13 speaks of a null character where older ones speak of a null byte.
    for name, problem in (("x" * 300, "File name too long"), ("a\0b", ".*embedded null (byte|character)")):
        with pytest.raises(PlanError, match=f"cannot be read: {problem}"):
            read(tmp_path / name, PlanError)


def test_no_more_is_read_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    assert refused(read_json, path, dict, PlanError) == "larger than 1,048,576 bytes, which no such file should be"
    assert read_bytes(write(tmp_path, "abc"), PlanError, 3) == b"abc"


def test_reading_leaves_the_recursion_limit_alone(tmp_path: Path) -> None:
    before = sys.getrecursionlimit()
    refused(read_json, write(tmp_path, "[" * 1000), dict, PlanError)
    assert sys.getrecursionlimit() == before


def test_files_are_read_up_to_their_bounds(tmp_path: Path) -> None:
    """64 bits, 64 levels; a megabyte of a configuration, 64 kilobytes of settings, 16 megabytes of a list."""
    assert (reading.SMALL, reading.SETTINGS, reading.LARGE) == (1_048_576, 65_536, 16_777_216)
    for number in (-(2**63), 2**63 - 1):
        assert read_json(write(tmp_path, f"[{number}]"), list[Any], PlanError) == [number]
        assert read_yaml(write(tmp_path, f"- {number}"), list[Any], PlanError) == [number]
    for number in (-(2**63) - 1, 2**63):
        for read in (read_json, read_yaml):
            assert (
                refused(read, write(tmp_path, f"[{number}]"), list[Any], PlanError)
                == "[0]: a whole number beyond 64 bits"
            )
    deep = "[" * 64 + "]" * 64
    assert read_json(write(tmp_path, deep), list[Any], PlanError) and read_yaml(
        write(tmp_path, deep), list[Any], PlanError
    )
    for read in (read_json, read_yaml):
        assert refused(read, write(tmp_path, f"[{deep}]"), list[Any], PlanError).endswith(
            "nested deeper than 64 levels"
        )


POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def test_a_git_lfs_pointer_is_said_to_be_one(tmp_path: Path) -> None:
    path = write(tmp_path, POINTER)
    for read in (read_json, read_yaml):
        assert refused(read, path, Outer, PlanError) == (
            "a Git LFS pointer, not the file itself; fetch it, in its repository: git lfs pull"
        )
    # A text that only speaks of one is none.
    for text in ("see " + POINTER, POINTER * 10):
        check_regular(write(tmp_path, text), PlanError)
