"""Load a model or its tokenizer from any MODEL: a folder, a converted checkpoint, a hub id or `demo`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax

from wisparse_jax.errors import ConfigError, WisparseError
from wisparse_jax.models import hub
from wisparse_jax.models.checkpoint import read_params
from wisparse_jax.models.config import LlamaConfig, read_config
from wisparse_jax.models.fingerprint import fingerprint
from wisparse_jax.models.llama import Llama
from wisparse_jax.models.tokenizer import Tokenizer, read_tokenizer

DTYPES = ("float32", "bfloat16", "float16")


def load(name: str | Path, dtype: str | None = None, weights: str | None = None) -> Llama:
    """Load a model onto the default device.

    Args:
        name: a folder (in Hugging Face format, or written by `wisparse convert`), a hub id `org/name`, or `demo`.
        dtype: "float32", "bfloat16" or "float16", of weights and activations; None is bfloat16 on GPU and TPU,
            float32 on CPU.
        weights: "int8" for block linears in int8, one scale per output channel; "int4" in int4, one for 128 of them
            and an input channel; None keeps them as they are.

    Raises:
        ConfigError: config.json or generation_config.json is missing, damaged or asks for what is not supported.
        WeightsError: weights are missing, unexpected, mis-shaped, damaged or not finite.
        WisparseError: no such model, or an unknown dtype or kind of weights.
    """
    if weights not in (None, "int8", "int4"):
        raise WisparseError(f"weights = {weights!r}: expected int8, int4, or nothing for those of the model")
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise WisparseError(f"dtype = {dtype!r}: expected one of {', '.join(DTYPES)}")
    folder = hub.resolve(name)
    config = read_model_config(folder)
    params, stored = read_params(folder, config, dtype)
    model = Llama.from_params(config, params)
    model.fingerprint = stored
    if weights is not None:
        from wisparse_jax.models.quantise import quantise

        return quantise(model, weights)
    return model


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load a model's tokenizer; `name` as in `load`.

    Raises:
        WisparseError: no such model, or no usable tokenizer in its folder.
    """
    return read_tokenizer(hub.resolve(name))


def model_fingerprint(model: Llama) -> str:
    """The fingerprint of the checkpoint a model was loaded from or, for a model made otherwise, of its parameters."""
    return model.fingerprint or fingerprint(model.config, model.params)


def read_model_config(folder: Path) -> LlamaConfig:
    """The configuration of a model folder; end-of-sequence ids from generation_config.json where that gives any.

    Instruction-tuned models end a turn with other tokens than a document, and list them there.

    Raises:
        ConfigError: see `config.read_config`; also a damaged generation_config.json.
    """
    config = read_config(folder)
    path = folder / "generation_config.json"
    if not path.is_file():
        return config
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    value = raw.get("eos_token_id") if isinstance(raw, dict) else None
    if value is None:
        return config
    ids = value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ConfigError(f"{path}: eos_token_id: expected a token id or a list of them, found {value!r}")
    return dataclasses.replace(config, eos_token_ids=tuple(ids))
