"""A short run of `scripts/fuzz_readers.py`: no mutated file gets through to the user but as one line."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
from fuzz_readers import Reader, fuzz, readers

EXAMPLES = {
    "config": 150,
    "generation_config": 80,
    "index": 150,
    "settings": 150,
    "manifest": 100,
    "weights": 60,
    "plan": 60,
    "tensors": 60,
    "identity": 60,
    "gguf": 30,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return readers(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", [*EXAMPLES, "orbax _METADATA", "tokenizer"])
def test_mutated_files_give_a_value_or_one_line(made: dict[str, Reader], name: str) -> None:
    counts: collections.Counter[str] = collections.Counter()
    examples = EXAMPLES.get(name, 4)
    assert fuzz(made[name], examples, 0, counts) < 5
    assert counts.total() >= examples and counts["refused"] > examples // 2


def test_what_a_reader_lets_through_fails(tmp_path: Path) -> None:
    """The fuzzer itself: a reader that is careless with one kind of file is found out."""
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "file"
    file.write_bytes(b'{"a": 1}')
    careless = Reader(file, lambda: 1 / (file.read_bytes().count(b"{") or 0))
    with pytest.raises(ZeroDivisionError):
        fuzz(careless, 200, 0, collections.Counter())
    assert file.read_bytes() == b'{"a": 1}'
