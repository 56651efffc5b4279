"""A tiny model as a folder in Hugging Face format, for what starts from files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from wisparse_jax.models.fingerprint import flat
from wisparse_jax.models.parameters import hf_name
from wisparse_jax.models.weights import transposed
from wisparse_jax.testing import tokenizers
from wisparse_jax.testing.tiny import tiny_config, tiny_model


def write_tiny_folder(folder: Path, context: int = 256) -> None:
    """A random model of three blocks with a byte-level tokenizer: config.json, model.safetensors, tokenizer.json."""
    tokenizer = tokenizers.write(folder, "byte level", "<s> $A", tokenizers.NAMED, family=None)
    size = tokenizer.get_vocab_size()
    config = tiny_config(vocab_size=size, context=context, bos_token_ids=(1,), eos_token_ids=(2,))
    raw = {
        "model_type": "llama",
        "vocab_size": size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_blocks,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": context,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = {}
    for path, leaf in flat(tiny_model(config).params).items():
        array = np.asarray(leaf)
        tensors[hf_name(path)] = np.ascontiguousarray(array.T if transposed(path) else array)
    save_file(tensors, folder / "model.safetensors")
