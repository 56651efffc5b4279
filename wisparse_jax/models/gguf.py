"""GGUF files (llama.cpp): their metadata as a `config.json`, their tensors as the parameter pytree.

llama.cpp keeps a matrix `[out, in]` as Hugging Face does, under other names; in its `llama` files the rows of q and k
are reordered, so that the two features which rotate together stand side by side.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from wisparse_jax.errors import ConfigError, WeightsError, WisparseError
from wisparse_jax.files import shown
from wisparse_jax.models.config import LlamaConfig, parse_config
from wisparse_jax.models.fingerprint import digest, flat, sample
from wisparse_jax.models.parameters import param_shapes
from wisparse_jax.models.rope import Rope
from wisparse_jax.models.weights import place, transposed

SUFFIX = ".gguf"
# Mistral's and SmolLM's files are `llama` files.
FAMILIES = ("llama", "qwen2", "qwen3")
ROPE_FACTORS = "rope_freqs.weight"

_LAYERS = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"} | {
    name: f"ffn_{name}" for name in ("gate", "up", "down")
}
# Parameter path -> GGUF tensor name; * is the number of the block.
_NAMES = (
    {"embed": "token_embd.weight", "norm": "output_norm.weight", "lm_head": "output.weight"}
    | {"blocks.*.attn_norm": "blk.*.attn_norm.weight", "blocks.*.mlp_norm": "blk.*.ffn_norm.weight"}
    | {f"blocks.*.{name}_norm": f"blk.*.attn_{name}_norm.weight" for name in ("q", "k")}
    | {f"blocks.*.{name}.kernel": f"blk.*.{theirs}.weight" for name, theirs in _LAYERS.items()}
    | {f"blocks.*.{name}.bias": f"blk.*.{theirs}.bias" for name, theirs in _LAYERS.items()}
)
# The Llama 3 rule is stored as its factors alone; these are the constants of every release that has it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


_WHOLE, _NUMBER, _TEXT, _FLAG = (int,), (int, float), (str,), (bool,)
# Metadata that is read, without the architecture's name: of which type it is, or its entries where it is a list.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("context_length", "embedding_length", "block_count", "feed_forward_length"), _WHOLE),
    **dict.fromkeys(("attention.head_count", "attention.head_count_kv", "expert_count", "split.count"), _WHOLE),
    **dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), _WHOLE),
    **dict.fromkeys(("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor"), _NUMBER),
    **dict.fromkeys(("general.architecture", "rope.scaling.type"), _TEXT),
    **dict.fromkeys(("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"), _TEXT),
    **{f"tokenizer.ggml.{name}_token_id": _WHOLE for name in ("bos", "eos", "eot", "eom", "unknown", "padding")},
    **dict.fromkeys(("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"), _FLAG),
}
_LISTS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.chat_templates"), _TEXT),
    "tokenizer.ggml.token_type": _WHOLE,
    "tokenizer.ggml.scores": _NUMBER,
}
_IN_WORDS = {_WHOLE: "a whole number", _NUMBER: "a number", _TEXT: "text", _FLAG: "true or false"}


def _check_type(path: Path, key: str, value: Any, name: str) -> None:
    kinds = _LISTS.get(name, _TYPES.get(name))
    if kinds is None:
        return
    entries = value if name in _LISTS and isinstance(value, list) else [value]
    fits = all(isinstance(v, kinds) and (bool in kinds or not isinstance(v, bool)) for v in entries)
    if not fits or isinstance(value, list) != (name in _LISTS):
        expected = f"a list of entries that are each {_IN_WORDS[kinds]}" if name in _LISTS else _IN_WORDS[kinds]
        raise WeightsError(f"{path}: {key} = {shown(value)}: expected {expected}")


class GgufFile:
    """An open GGUF file: `file[key]` is a metadata value or None, `file.tensors` the tensors by name.

    Raises:
        WisparseError: the gguf library is not installed, or there is no such file.
        WeightsError: the file is not readable as GGUF, or only a part of a model.
    """

    def __init__(self, path: Path):
        try:
            import gguf
        except ModuleNotFoundError:
            raise WisparseError(
                f"{path}: reading GGUF files needs the gguf library: pip install 'wisparse-jax[gguf]'"
            ) from None
        if not os.path.isfile(path):
            raise WisparseError(f"{path}: no such file")
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            self._values = {key: field.contents() for key, field in reader.fields.items()}
        except Exception as error:  # the library raises many kinds for damaged files
            raise WeightsError(f"{path}: not readable as GGUF (damaged or truncated?): {error}") from None
        family = self._values.get("general.architecture")
        for key, value in self._values.items():
            _check_type(path, key, value, key.removeprefix(f"{family}."))
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        if (parts := self["split.count"] or 1) > 1:
            raise WeightsError(f"{path}: one of {parts} parts; join them first: llama-gguf-split --merge FIRST OUT")

    def __getitem__(self, key: str) -> Any:
        return self._values.get(key)

    def values(self, name: str) -> np.ndarray:
        """A tensor's values; quantised ones in bfloat16, others in their own dtype.

        Raises:
            WeightsError: of a type that the gguf library cannot dequantise.
        """
        import gguf

        tensor = self.tensors[name]
        if tensor.data.dtype in (np.float32, np.float16):
            return tensor.data
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise WeightsError(f"{self.path}: tensor {name}: the gguf library cannot dequantise {kind}") from None
        return values.astype(ml_dtypes.bfloat16)


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The contents of the `config.json` that the file's metadata stand for.

    Raises:
        ConfigError: a model that is not supported; names the file, the key and its value.
    """
    family = file["general.architecture"]
    if family not in FAMILIES:
        raise ConfigError(
            f"{file.path}: general.architecture = {family!r} is not supported; expected one of {', '.join(FAMILIES)}"
        )
    for key, accepted in ((f"{family}.expert_count", (None, 0)), (f"{family}.logit_scale", (None, 1.0))):
        if file[key] not in accepted:
            raise ConfigError(f"{file.path}: {key} = {file[key]!r} is not supported")
    heads, hidden = file[f"{family}.attention.head_count"], file[f"{family}.embedding_length"]
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise ConfigError(
            f"{file.path}: {family}.attention.head_count and .embedding_length: expected two whole numbers"
        )
    head_dim = file[f"{family}.attention.key_length"] or hidden // heads
    for key in (f"{family}.attention.value_length", f"{family}.rope.dimension_count"):
        if file[key] not in (None, head_dim):
            raise ConfigError(f"{file.path}: {key} = {file[key]!r}: expected the head dimension, {head_dim}")
    embedding = file.tensors.get("token_embd.weight")
    biases = {name: f"blk.0.{theirs}.bias" in file.tensors for name, theirs in _LAYERS.items()}
    theta = _shortest(file[f"{family}.rope.freq_base"], 10000.0)
    raw = {
        "model_type": family,
        "hidden_act": "silu",
        "vocab_size": None if embedding is None else int(embedding.shape[1]),
        "hidden_size": hidden,
        "intermediate_size": file[f"{family}.feed_forward_length"],
        "num_hidden_layers": file[f"{family}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": file[f"{family}.attention.head_count_kv"] or heads,
        "head_dim": head_dim,
        "max_position_embeddings": file[f"{family}.context_length"],
        "rms_norm_eps": _shortest(file[f"{family}.attention.layer_norm_rms_epsilon"], 1e-6),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, family, theta, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file["tokenizer.ggml.bos_token_id"],
        "eos_token_id": file["tokenizer.ggml.eos_token_id"],
    }
    if family != "qwen2":
        raw |= {"attention_bias": biases["q"]}
    if family == "llama":
        raw |= {"mlp_bias": biases["gate"]}
    try:
        parse_config(raw)
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from None
    return raw


def end_tokens(file: GgufFile) -> list[int]:
    """The tokens that end an answer: of a text, of a turn, of a message."""
    ids = (file[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(i for i in ids if i is not None))


def read_gguf(file: GgufFile, config: LlamaConfig, dtype: str | None = None) -> tuple[dict[str, Any], str]:
    """The parameters and the fingerprint of a GGUF file, tensor by tensor; see `weights.read_weights`.

    Raises:
        WeightsError: a tensor is missing, unexpected, mis-shaped or not finite, or cannot be dequantised.
    """
    shapes = param_shapes(config)
    leaves = flat(shapes)
    wanted = {gguf_name(path): path for path in leaves}
    if absent := sorted(wanted.keys() - file.tensors.keys()):
        raise WeightsError(f"{file.path}: tensor {absent[0]} is missing ({len(absent)} in all)")
    if extra := sorted(file.tensors.keys() - wanted.keys() - {ROPE_FACTORS}):
        raise WeightsError(f"{file.path}: tensor {extra[0]} is unexpected; a {config.family} model has none")
    values: dict[str, jax.Array] = {}
    samples: dict[str, tuple[tuple[int, ...], np.ndarray]] = {}
    for name, path in wanted.items():
        shape, turned = leaves[path].shape, transposed(path)
        stored, expected = file.values(name), shape[::-1] if turned else shape
        if stored.shape != expected:
            raise WeightsError(f"{file.path}: tensor {name}: expected shape {expected}, found {stored.shape}")
        layer = path.split(".")[-2] if path.startswith("blocks.") else ""
        if config.family == "llama" and layer in ("q", "k"):
            stored = _halves(stored, config.num_heads if layer == "q" else config.num_kv_heads)
        samples[path] = (shape, sample(stored.T if turned else stored))
        values[path] = place(stored, dtype, turned, f"{file.path}: tensor {name}")
    return jax.tree.unflatten(jax.tree.structure(shapes), [values[path] for path in leaves]), digest(config, samples)


def gguf_name(path: str) -> str:
    """The name in a GGUF file of the parameter at a path such as `blocks.0.q.kernel`."""
    number = re.search(r"\d+", path)
    name = _NAMES[re.sub(r"\d+", "*", path)]
    return name.replace("*", number.group()) if number else name


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k with each head's features in two halves, from pairs side by side."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _shortest(value: float | None, default: float) -> float:
    """A float32 of the metadata as it was written in decimals: 1e-05, not 9.999999747378752e-06."""
    return default if value is None else float(str(np.float32(value)))


def _rope_scaling(file: GgufFile, family: str, theta: float, head_dim: int) -> dict[str, Any] | None:
    key = f"{family}.rope.scaling.type"
    kind = file[key]
    if ROPE_FACTORS in file.tensors:
        factors = file.values(ROPE_FACTORS).astype(np.float32)
        found = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
        rule = Rope.parse({"rope_theta": theta, "rope_scaling": found}, 8192).frequencies(head_dim)
        if factors.shape != rule.shape or not np.allclose(Rope(theta).frequencies(head_dim) / factors, rule, rtol=1e-3):
            raise ConfigError(
                f"{file.path}: tensor {ROPE_FACTORS}: expected the factors of Llama 3's rule, found others"
            )
        return found
    if kind == "linear":
        return {"rope_type": "linear", "factor": _shortest(file[f"{family}.rope.scaling.factor"], 1.0)}
    if kind not in (None, "none"):
        raise ConfigError(f"{file.path}: {key} = {kind!r} is not supported; expected none or linear")
    return None
