"""The text that a command calibrates or measures on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wisparse_jax.errors import WisparseError

if TYPE_CHECKING:
    import numpy as np

    from wisparse_jax.models.llama import Llama

SELF = "self"


def check_text(text: str) -> None:
    """Refuse a text that is not there.

    Raises:
        WisparseError: no such file.
    """
    if text != SELF and not Path(text).is_file():
        raise WisparseError(f"{text}: no such file")


def short_name(text: str) -> str:
    """What a record calls a text: no folders of this machine."""
    return text if text == SELF else Path(text).name


def file_windows(name: str, text: str, window: int, tokens: int) -> np.ndarray:
    """Windows of a file, by the tokenizer of the model of that name; the model itself is not loaded.

    Raises:
        WisparseError: the file cannot be read, or is too short or too monotonous.
    """
    from wisparse_jax.calibration import check_variety
    from wisparse_jax.evaluation import text_windows
    from wisparse_jax.models import hub
    from wisparse_jax.models.loading import load_tokenizer, read_model_config

    config = read_model_config(hub.resolve(name, ("config",)))
    windows = text_windows(load_tokenizer(name), text, min(window, config.context), tokens)
    check_variety(windows, config.vocab_size)
    return windows


def sampled_windows(model: Llama, window: int, tokens: int, seed: int) -> np.ndarray:
    """Windows that the model samples.

    Raises:
        WisparseError: they repeat themselves, or the model's activations overflow on them.
    """
    from wisparse_jax.calibration import check_variety, run_dense
    from wisparse_jax.inference import sample_windows
    from wisparse_jax.processes import is_first

    window = min(window, model.config.context)
    windows = sample_windows(model, -(-tokens // window), window, seed=seed, progress=is_first())
    try:
        check_variety(windows, model.config.vocab_size)
    except WisparseError:
        run_dense(model, windows[:1])  # names the layer: a model that overflows repeats a token for ever
        raise
    return windows
