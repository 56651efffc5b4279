"""GGUF files of the tiny model, with any metadata: for what reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from wisparse_jax.models.fingerprint import flat
from wisparse_jax.models.gguf import gguf_name
from wisparse_jax.models.weights import transposed
from wisparse_jax.testing import tiny_config, tiny_model

TOKENS = ["<unk>", "<s>", "</s>", *(chr(i) for i in range(33, 127)), "ab", "Ġ", "Ċ"]
# Of the tiny model, as llama.cpp names it.
METADATA: dict[str, Any] = {
    "llama.context_length": 128,
    "llama.embedding_length": 32,
    "llama.block_count": 3,
    "llama.feed_forward_length": 56,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.scaling.type": "linear",
    "llama.rope.scaling.factor": 2.0,
    "split.count": 1,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (len(TOKENS) - 3)],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages }}",
}


def gguf_maker(scratch: Path) -> Callable[[Any], bytes]:
    """What makes a GGUF file of the tiny model with given metadata, each value of the type that it has in Python."""
    import gguf

    params = flat(tiny_model(tiny_config(vocab_size=len(TOKENS))).params)
    tensors = {gguf_name(path): np.asarray(leaf.T if transposed(path) else leaf) for path, leaf in params.items()}

    def text(value: Any) -> str:
        return str(value).encode("utf-8", "replace").decode()

    def make(metadata: Any) -> bytes:
        writer = gguf.GGUFWriter(scratch, "llama")
        for key, value in (metadata if isinstance(metadata, dict) else {"x": metadata}).items():
            if isinstance(value, bool):
                writer.add_bool(text(key), value)
            elif isinstance(value, int) and -(2**63) <= value < 2**63:
                (writer.add_uint32 if 0 <= value < 2**32 else writer.add_int64)(text(key), value)
            elif isinstance(value, float):
                writer.add_float64(text(key), value)
            elif isinstance(value, list) and value and isinstance(value[0], str | int):
                kind = text if isinstance(value[0], str) else lambda entry: len(str(entry))
                writer.add_array(text(key), [kind(entry) for entry in value])
            else:
                writer.add_string(text(key), text(value))
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return scratch.read_bytes()

    return make
