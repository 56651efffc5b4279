"""The settings of transformers' `generate`: what this package samples by, and what it refuses as it would not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wisparse_jax.errors import ConfigError, WisparseError
from wisparse_jax.files.reading import read_json, shown
from wisparse_jax.inference.sampling import Sample

# What transformers 5 takes where neither a request nor the model says.
DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
# Settings that change what is chosen, which nothing here does, with the value that changes nothing; so does None.
REFUSED: dict[str, Any] = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "top_h": None,
    "penalty_alpha": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
}
# Of these, those that a greedy choice knows nothing of.
_OF_SAMPLING = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
# Of a request alone: without beams, a model's configuration may say what it likes here.
_OF_REQUESTS = {"num_return_sequences": 1, "length_penalty": 1.0, "early_stopping": False, "use_cache": True}


def sampler_of(asked: Mapping[str, Any], model: Mapping[str, Any] | None = None) -> Sample:
    """The sampler of a request with transformers' settings: greedy unless `do_sample`, and 50 tokens unless `top_k`.

    Args:
        asked: the settings by transformers' names; None is as if it were not there.
        model: those of the model's generation_config.json, which hold where nothing is asked.

    Raises:
        WisparseError: a setting that is not honoured and would change what is chosen, or a value that cannot be.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    samples = given.pop("do_sample", False)
    if not isinstance(samples, bool):
        raise WisparseError(f"do_sample = {samples!r}: expected true or false")
    settings = DEFAULTS | dict(model or {}) | given
    for name, value in settings.items():
        if name not in DEFAULTS and (samples or name not in _OF_SAMPLING):
            _check_off(name, value, "" if name in given else "generation_config.json: ")
    if not samples:
        return Sample(0.0, repetition_penalty=_number(settings["repetition_penalty"]))
    temperature = _number(settings["temperature"])
    if temperature == 0:
        raise WisparseError("do_sample = True: expected a temperature above 0, found none or 0")
    top_k, top_p = settings["top_k"], _number(settings["top_p"])
    if top_p == 0:  # the most likely token alone
        top_k, top_p = 1, 1.0
    rest = (_number(settings[name]) for name in ("min_p", "repetition_penalty"))
    return Sample(temperature, None if top_k == 0 else top_k, top_p, *rest)


def read_generation_settings(folder: Path) -> dict[str, Any]:
    """What a model's generation_config.json says of `sampler_of`'s settings; nothing where there is no such file.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    found: dict[str, Any] = read_json(path, dict[str, Any], ConfigError)
    known = {name: value for name, value in found.items() if name in (*DEFAULTS, *REFUSED)}
    return {name: value for name, value in known.items() if value is not None}


def _check_off(name: str, value: Any, where: str) -> None:
    off = REFUSED | _OF_REQUESTS
    if name not in off:
        raise WisparseError(f"{name} = {shown(value)}: not known: expected some of {', '.join(DEFAULTS)}, do_sample")
    if value != off[name] and value != []:
        instead = f"{off[name]}, or nothing" if off[name] is not None else "nothing"
        raise WisparseError(f"{where}{name} = {shown(value)}: not done here: expected {instead}")


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
