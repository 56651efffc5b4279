"""config.json as transformers reads it: rotary settings, and what a field that is not there stands for."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wisparse_jax.errors import ConfigError
from wisparse_jax.models import config_fields
from wisparse_jax.models.config import FAMILIES, parse_config, read_config
from wisparse_jax.models.rope import Rope

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "max_position_embeddings": 64,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
WITHOUT_ORIGINAL = {name: value for name, value in LLAMA3.items() if "original" not in name}


def theirs(raw: dict[str, Any]) -> Any:
    """transformers' own reading."""
    from transformers import AutoConfig

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    config.standardize_rope_params()  # as its rotary embedding does before it computes
    return config


def same_rope(ours: Rope, parameters: dict[str, Any]) -> bool:
    """Whether ours has the values that transformers computes with."""
    names = {
        "theta": "rope_theta",
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_context": "original_max_position_embeddings",
    }
    read = {"default": 1, "linear": 2, "llama3": 5}[ours.kind]
    values = dataclasses.asdict(ours)
    wanted = {field: parameters[name] for field, name in list(names.items())[:read]}
    return ours.kind == parameters["rope_type"] and {field: values[field] for field in wanted} == wanted


ROPES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta": {"rope_theta": 5e5},
    "null scaling": {"rope_theta": 5e5, "rope_scaling": None},
    "old llama3": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "old linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "new": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "theta outside": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", **LLAMA3}},
    "both names of the kind": {"rope_parameters": {"rope_type": "linear", "type": "linear", "factor": 4}},
    "scaling over parameters": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
    },
    "scaling over equal parameters": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "empty scaling": {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "the context stands for the original": {"rope_parameters": {"rope_type": "llama3", **WITHOUT_ORIGINAL}},
    "original outside": {
        "original_max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "llama3", **WITHOUT_ORIGINAL},
    },
    "whole rotation, said": {"partial_rotary_factor": 1.0, "rope_theta": 5e5},
    "not interleaved, said": {"rope_interleaved": False, "rope_theta": 5e5},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ROPES)
def test_rotary_settings_are_transformers(name: str, family: str) -> None:
    raw = {"model_type": family, **SIZES, **ROPES[name]}
    assert same_rope(parse_config(raw).rope, theirs(raw).rope_parameters)


def test_a_scaling_that_is_added_changes_the_frequencies() -> None:
    plain = {"model_type": "llama", **SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    scaled = parse_config(plain | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}).rope
    np.testing.assert_allclose(scaled.frequencies(8) * 4, parse_config(plain).rope.frequencies(8), rtol=1e-6)


NOT_APPLIED: dict[str, tuple[dict[str, Any], str]] = {
    "theta of replaced parameters": (
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        r"rope_parameters.rope_theta = 500000.0 would not be applied beside rope_scaling",
    ),
    "scaling of replaced parameters": (
        {"rope_parameters": {"rope_type": "llama3", **LLAMA3}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        r"rope_parameters.rope_type = 'llama3' would not be applied beside rope_scaling",
    ),
    "two thetas": (
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        r"rope_theta = 1000000.0 would not be applied with rope_parameters.rope_type = 'default'",
    ),
    "two originals": (
        {"original_max_position_embeddings": 16, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        r"rope_scaling.original_max_position_embeddings = 32 would not be applied",
    ),
    "an original that nothing reads": ({"original_max_position_embeddings": 16}, "would not be applied"),
    "a factor without a kind": ({"rope_scaling": {"factor": 8.0}}, r"rope_scaling.factor = 8.0 would not be applied"),
    "a field of another kind": (
        {"rope_scaling": {"rope_type": "llama3", "beta_fast": 32, **LLAMA3}},
        r"rope_scaling.beta_fast = 32 would not be applied with rope_type = 'llama3'",
    ),
    "two kinds": (
        {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}},
        "rope_type = 'linear' and type = 'dynamic' contradict each other",
    ),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: only 1.0 is supported"),
    "partial, inside": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "only 1.0 is supported"),
    "interleaved": ({"rope_interleaved": True}, "rope_interleaved = True would not be applied"),
    "local base": ({"rope_local_base_freq": 1e4}, "rope_local_base_freq = 10000.0 would not be applied"),
    "share": ({"rotary_pct": 0.25}, "rotary_pct = 0.25 would not be applied"),
    "blocks without": ({"no_rope_layers": [1, 0]}, r"no_rope_layers = \[1, 0\] would not be applied"),
    "by kind of block": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}},
        "rope_parameters.full_attention = .* would not be applied",
    ),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported; expected one of"),
    "half an original": (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 16.5}},
        "original_max_position_embeddings: expected a positive whole number, found 16.5",
    ),
    "a kind that is no name": ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope_type = \['linear'\]"),
    "no object": ({"rope_parameters": 5, "rope_scaling": {"type": "linear", "factor": 2.0}}, "expected an object"),
}


@pytest.mark.parametrize("name", NOT_APPLIED)
def test_rotary_settings_that_would_not_be_applied_are_refused(name: str) -> None:
    changes, message = NOT_APPLIED[name]
    with pytest.raises(ConfigError, match=message):
        parse_config({"model_type": "llama", **SIZES, **changes})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("null", [False, True])
def test_an_absent_field_has_the_familys_default(family: str, null: bool) -> None:
    """`null` for those that transformers lets be null."""
    raw: dict[str, Any] = {"model_type": family, **SIZES}
    if null:
        raw |= {"bos_token_id": None, "eos_token_id": None, "sliding_window": None}
        raw |= {"num_key_value_heads": 8 if family == "mistral" else None}
    else:
        del raw["max_position_embeddings"]
    ours, expected = parse_config(raw), theirs(raw)
    assert ours.context == expected.max_position_embeddings
    assert ours.num_kv_heads == expected.num_key_value_heads
    assert ours.head_dim == getattr(expected, "head_dim", 2)
    assert ours.bos_token_ids == (() if expected.bos_token_id is None else (expected.bos_token_id,))
    assert ours.eos_token_ids == (() if expected.eos_token_id is None else (expected.eos_token_id,))
    assert ours.norm_eps == expected.rms_norm_eps and ours.tied_embeddings == expected.tie_word_embeddings
    assert ours.windows == (getattr(expected, "sliding_window", None),) * 2


def test_the_packaged_configurations_are_read_as_before(repository: Path) -> None:
    for path in sorted((repository / "configs").glob("*.json")):
        raw = json.loads(path.read_text())
        ours, expected = read_config(path), theirs(raw)
        assert same_rope(ours.rope, expected.rope_parameters) and ours.context == expected.max_position_embeddings


def test_tensor_parallel_pretraining_is_ignored() -> None:
    assert parse_config({"model_type": "llama", **SIZES, "pretraining_tp": 4}) == parse_config(
        {"model_type": "llama", **SIZES}
    )


def test_special_tokens_outside_the_vocabulary_are_none() -> None:
    raw = {"model_type": "llama", **SIZES, "bos_token_id": 96, "eos_token_id": [2, -1, 95, 2**40]}
    config = parse_config(raw)
    assert config.bos_token_ids == () and config.eos_token_ids == (2, 95)
    assert dataclasses.replace(config, eos_token_ids=(7, 2**33)).eos_token_ids == (7,)


LARGEST = {
    "hidden_size": 2**31 - 1,
    "vocab_size": 2**31 - 1,
    "max_position_embeddings": 2**24,
    "num_hidden_layers": 4096,
}


@pytest.mark.parametrize("field", LARGEST)
@pytest.mark.parametrize("times", [1, 10**4])
def test_sizes_that_no_model_has_are_refused_at_once(field: str, times: int) -> None:
    value = (LARGEST[field] + 1) * times
    message = f"{field}: expected a positive whole number up to {LARGEST[field]}, found {value}"
    with pytest.raises(ConfigError, match=message):
        parse_config({"model_type": "llama", **SIZES, field: value})


WINDOW = {"sliding_window": 16, "head_dim": 2}
BY_BLOCK = ["full_attention", "sliding_attention"]
WINDOWS: dict[str, dict[str, Any]] = {
    "every block": {"model_type": "mistral", **WINDOW},
    "mistral by block": {"model_type": "mistral", **WINDOW, "layer_types": BY_BLOCK},
    "mistral, null": {"model_type": "mistral", **WINDOW, "layer_types": None},
    "ministral": {"model_type": "ministral", **WINDOW, "layer_types": BY_BLOCK},
    "ministral without a window": {"model_type": "ministral", "sliding_window": None, "head_dim": 2},
    "qwen2 by block": {"model_type": "qwen2", **WINDOW, "use_sliding_window": True, "layer_types": BY_BLOCK},
    "qwen3 from a block on": {"model_type": "qwen3", **WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen2, not in use": {"model_type": "qwen2", **WINDOW, "layer_types": ["full_attention"] * 2},
    "llama, all full": {"model_type": "llama", "layer_types": ["full_attention"] * 2},
    "llama, a window of the whole context": {"model_type": "llama", "sliding_window": 64},
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_those_of_transformers_auto_class(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    raw = SIZES | WINDOWS[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    expected = AutoConfig.from_pretrained(tmp_path)
    kinds = getattr(expected, "layer_types", None)
    kinds = [None if expected.model_type == "llama" else "sliding_attention"] * 2 if kinds is None else kinds
    window = getattr(expected, "sliding_window", None)
    assert parse_config(raw).windows == tuple(window if kind == "sliding_attention" else None for kind in kinds)


OTHER_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "no causal mask": (
        {"is_causal": False},
        "is_causal = False is not supported for model_type = 'llama'; expected true",
    ),
    "chunks": ({"attention_chunk_size": 8192}, "attention_chunk_size = 8192 is not supported .* expected null"),
    "layers that differ": ({"per_layer_config": {"1": {"num_key_value_heads": 1}}}, "per_layer_config = {'1'"),
    "a window for the cache": ({"sliding_window": 16}, "sliding_window = 16 is not supported for model_type = 'llama'"),
    "blocks of another kind": (
        {"layer_types": ["sliding_attention"] * 2},
        "layer_types holds 'sliding_attention'; expected full_attention, as no sliding window is in use",
    ),
    "chunked blocks": (
        {"model_type": "ministral", "layer_types": ["chunked_attention"] * 2, "num_key_value_heads": 32},
        "layer_types holds 'chunked_attention'; expected full_attention or sliding_attention$",
    ),
    "a window that is switched off": (
        {"model_type": "qwen2", "layer_types": BY_BLOCK, "use_sliding_window": False},
        "layer_types holds 'sliding_attention'; expected full_attention, as no sliding window is in use",
    ),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_field_that_changes_what_is_computed_refuses_the_model(name: str) -> None:
    changes, message = OTHER_MODELS[name]
    with pytest.raises(ConfigError, match=message):
        parse_config({"model_type": "llama", **SIZES, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_that_transformers_reads_is_honoured_or_known_not_to_matter(family: str) -> None:
    """Fails for the first release whose class of a family has a field more: it is to be read, or listed."""
    assert config_fields.class_fields(family).keys() <= config_fields.HONOURED[family] | config_fields.WITHOUT_EFFECT


def test_a_field_of_a_newer_class_refuses_unless_it_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    read = config_fields.class_fields("llama") | {"new_scale": 1.0}
    monkeypatch.setattr(config_fields, "class_fields", lambda family: read)
    raw = {"model_type": "llama", **SIZES}
    assert parse_config(raw | {"new_scale": 1, "read_by_nobody": 2}) == parse_config(raw)
    with pytest.raises(ConfigError, match=r"new_scale = 2.0 is not supported for model_type = 'llama'; expected 1.0"):
        parse_config(raw | {"new_scale": 2.0})


def test_both_names_of_silu() -> None:
    raw = {"model_type": "llama", **SIZES}
    assert parse_config(raw | {"hidden_act": "swish"}) == parse_config(raw)
