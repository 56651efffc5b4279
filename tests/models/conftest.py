"""A small model folder that tests may damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
Tensors = dict[str, np.ndarray]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """config.json and model.safetensors (bf16) of a small Llama 3."""
    return copy("llama3", tmp_path / "model")


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """The same of a small Llama 3.2, whose head is its embedding."""
    return copy("llama3.2", tmp_path / "tied")


def copy(variant: str, to: Path) -> Path:
    to.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(PARITY / variant / name, to / name)
    return to


@pytest.fixture
def edit() -> Callable[[Path, Callable[[Tensors], object]], None]:
    """Change the tensors of a safetensors file in place: `edit(file, change)`."""

    def apply(file: Path, change: Callable[[Tensors], object]) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return apply


@pytest.fixture
def shard() -> Callable[[Path], Path]:
    """Split model.safetensors into two shards with an index; returns the index."""

    def split(folder: Path) -> Path:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        weight_map = {}
        for part in (0, 1):
            file = f"model-0000{part + 1}-of-00002.safetensors"
            names = sorted(tensors)[part::2]
            save_file({name: tensors[name] for name in names}, folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
        return index

    return split
