"""How much a search may spend, and which of its parts are switched: the settings of all stages and allocators."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from wisparse_jax.calibration.settings import TextSettings
from wisparse_jax.errors import ConfigError
from wisparse_jax.files import read_yaml
from wisparse_jax.search.allocators.evolution import EvolutionSettings
from wisparse_jax.search.allocators.paper import PaperSettings
from wisparse_jax.search.judge import ComparisonSettings
from wisparse_jax.search.stages.basis import BasisSettings
from wisparse_jax.search.stages.budgets import AllocationSettings
from wisparse_jax.search.stages.exponents import ExponentSettings
from wisparse_jax.search.stages.training import TrainingSettings


@dataclasses.dataclass(frozen=True)
class SearchSettings(
    PaperSettings,
    EvolutionSettings,
    AllocationSettings,
    ExponentSettings,
    TrainingSettings,
    BasisSettings,
    ComparisonSettings,
    TextSettings,
):
    """The search's budget; the defaults suit a GPU and a model of several billion parameters."""


def read_settings(path: str | Path | None) -> SearchSettings:
    """Settings from a YAML file that names the fields to change; None gives the defaults.

    Raises:
        ConfigError: not readable, not YAML, an unknown field or a bad value; names file and field.
    """
    return SearchSettings() if path is None else read_yaml(path, SearchSettings, ConfigError)
