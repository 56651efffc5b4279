"""Fields of config.json by family: those that are honoured, those that change no logits, which of the rest refuse."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from wisparse_jax.errors import ConfigError
from wisparse_jax.files import shown

_ALL = frozenset(
    (
        *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
        *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor"),
        *("tie_word_embeddings", "bos_token_id", "eos_token_id"),
        *("quantization_config", "quantization", "compression_config"),
    )
)
_BY_BLOCK = {"sliding_window", "layer_types"}
_QWEN = _ALL | _BY_BLOCK | {"use_sliding_window", "max_window_layers"}
# What `config.parse_config` reads, so that whatever these say is applied or refused there.
HONOURED = {
    "llama": _ALL | _BY_BLOCK | {"attention_bias", "mlp_bias"},
    "mistral": _ALL | _BY_BLOCK,
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"attention_bias"},
}
# Of training, of classification, of how a run is carried out, of who wrote the file: no logits depend on them.
WITHOUT_EFFECT = frozenset(
    (
        *("architectures", "auto_map", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash"),
        *("dtype", "torch_dtype", "use_cache", "return_dict", "output_attentions", "output_hidden_states"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "gradient_checkpointing"),
        *("initializer_range", "attention_dropout", "hidden_dropout", "classifier_dropout", "pretraining_tp"),
        *("id2label", "label2id", "num_labels", "problem_type", "pad_token_id", "sep_token_id", "task_specific_params"),
        *("chunk_size_feed_forward", "is_decoder", "is_encoder_decoder", "tie_last_hidden_states", "torchscript"),
        *("transformers.js_config", "unsloth_fixed", "unsloth_version"),
    )
)
# What transformers reads of any model's configuration, whatever its class lists, and where that changes nothing.
_OF_ANY_CLASS = {"is_causal": True, "attention_chunk_size": None, "kv_sharing_modes": None, "per_layer_config": None}


def refuse_unknown_fields(raw: dict[str, Any], family: str) -> None:
    """Refuse a field that transformers would read and nothing here does, unless it has its default.

    Which fields those are transformers' own class of the family says; one that it does not read is ignored, as there.

    Raises:
        ConfigError: names the field and its value.
    """
    others = [name for name in raw if name not in HONOURED[family] and name not in WITHOUT_EFFECT]
    if not others:
        return
    read = class_fields(family) | _OF_ANY_CLASS
    for name in others:
        if name in read and raw[name] != read[name]:
            raise ConfigError(
                f"{name} = {shown(raw[name])} is not supported for model_type = {family!r}; expected "
                f"{json.dumps(read[name])}, or no such field"
            )


def class_fields(family: str) -> dict[str, Any]:
    """The fields of a family's configuration class with their defaults."""
    # Keeps transformers from advising to install PyTorch, which configurations do not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import CONFIG_MAPPING

    fields = {}
    for field in dataclasses.fields(CONFIG_MAPPING[family]):
        factory = field.default_factory
        fields[field.name] = field.default if factory is dataclasses.MISSING else factory()
    return fields
