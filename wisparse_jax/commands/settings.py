"""The search settings of a command: those that were asked for, or those that fit the model and the device."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wisparse_jax.search import SearchSettings


def settings_for(choice: str | None, model: str) -> SearchSettings:
    """The settings of a preset's name or a file; without a choice, what was chosen is said on standard error.

    Raises:
        WisparseError: neither, or no model of that name.
    """
    from wisparse_jax.models import hub
    from wisparse_jax.models.loading import read_model_config
    from wisparse_jax.presets import fitting_preset, preset
    from wisparse_jax.processes import is_first

    if choice is None:
        choice, reason = fitting_preset(read_model_config(hub.resolve(model, ("config",))))
        if is_first():
            print(f"settings: {choice}, {reason}; --config takes others", file=sys.stderr)
    return preset(choice)
