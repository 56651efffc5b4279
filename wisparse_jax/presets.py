"""Search settings and shapes of models by name: the files of `configs/`, which the installed package holds too."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path
from typing import TYPE_CHECKING

from wisparse_jax.errors import ConfigError
from wisparse_jax.files import expanded

if TYPE_CHECKING:
    from wisparse_jax.models.config import LlamaConfig
    from wisparse_jax.search import SearchSettings

SMALL_MODEL = 1_000_000_000  # weights of the block linears, below which a GPU has time for a thorough search


def presets() -> dict[str, Path]:
    """The packaged settings files by name, the cheapest first."""
    files = _files("*.yaml")
    return dict(sorted(files.items(), key=lambda item: _cost(item[1])))


def fitting_preset(config: LlamaConfig) -> tuple[str, str]:
    """The preset that suits a model on the device that JAX computes on, and why."""
    import jax

    if jax.default_backend() == "cpu":
        return "quick", "on a CPU"
    weights = config.num_blocks * sum(config.layer_weights)
    if weights < SMALL_MODEL:
        return "thorough", f"for {weights / 1e6:.0f} million weights on a GPU or TPU"
    return "default", f"for {weights / 1e9:.1f} billion weights"


def shapes() -> dict[str, Path]:
    """The packaged configurations of known models, in the form of their config.json, by name."""
    return _files("*.json")


def settings_file(choice: str | Path | None) -> Path | None:
    """The settings file of a preset's name or of a path; a name comes before a file of the same spelling.

    Raises:
        ConfigError: neither.
    """
    if choice is None:
        return None
    known = presets()
    file = known.get(str(choice), expanded(choice))
    if not os.path.exists(file):
        raise ConfigError(f"{file}: no such file; expected a file or one of {', '.join(known)}")
    return file


def preset(choice: str | Path | None) -> SearchSettings:
    """The search settings of a preset's name or of a file that names what to change; None gives the defaults.

    Raises:
        ConfigError: neither, or a file that is not readable or has an unknown field or a bad value.
    """
    from wisparse_jax.search import read_settings

    return read_settings(settings_file(choice))


def description(file: Path) -> str:
    """What a settings file says about itself: the comment at its head."""
    lines = file.read_text(encoding="utf-8").splitlines()
    head = lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    return " ".join(line.removeprefix("#").strip() for line in head)


def _files(pattern: str) -> dict[str, Path]:
    folder = Path(str(importlib.resources.files("wisparse_jax") / "configs"))
    return {file.stem: file for file in sorted(folder.glob(pattern))}


def _cost(file: Path) -> int:
    from wisparse_jax.search import read_settings

    return read_settings(file).tokens
