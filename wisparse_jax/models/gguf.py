"""GGUF files (llama.cpp): their metadata, and their tensors as the parameter pytree.

llama.cpp keeps a matrix `[out, in]` as Hugging Face does, under other names; in its `llama` files the rows of q and k
are reordered, so that the two features which rotate together stand side by side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from wisparse_jax.errors import WeightsError, WisparseError
from wisparse_jax.files import check_regular, shown
from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.fingerprint import digest, flat, sample
from wisparse_jax.models.parameters import param_shapes
from wisparse_jax.models.weights import place, transposed

SUFFIX = ".gguf"
ROPE_FACTORS = "rope_freqs.weight"

LAYER_NAMES = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"} | {
    name: f"ffn_{name}" for name in ("gate", "up", "down")
}
# Parameter path -> GGUF tensor name; * is the number of the block.
_NAMES = (
    {"embed": "token_embd.weight", "norm": "output_norm.weight", "lm_head": "output.weight"}
    | {"blocks.*.attn_norm": "blk.*.attn_norm.weight", "blocks.*.mlp_norm": "blk.*.ffn_norm.weight"}
    | {f"blocks.*.{name}_norm": f"blk.*.attn_{name}_norm.weight" for name in ("q", "k")}
    | {f"blocks.*.{name}.kernel": f"blk.*.{theirs}.weight" for name, theirs in LAYER_NAMES.items()}
    | {f"blocks.*.{name}.bias": f"blk.*.{theirs}.bias" for name, theirs in LAYER_NAMES.items()}
)

_SPECIAL = ("bos", "eos", "eot", "eom", "unknown", "padding", "fim_pad", "fim_rep", "fim_sep")
_WHOLE, _NUMBER, _TEXT, _FLAG = (int,), (int, float), (str,), (bool,)
# Metadata that is read, without the architecture's name: of which type it is, or its entries where it is a list.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("context_length", "embedding_length", "block_count", "feed_forward_length"), _WHOLE),
    **dict.fromkeys(("attention.head_count", "attention.head_count_kv", "expert_count", "split.count"), _WHOLE),
    **dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), _WHOLE),
    **dict.fromkeys(("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor"), _NUMBER),
    "rope.scale_linear": _NUMBER,
    **dict.fromkeys(("general.architecture", "general.type", "rope.scaling.type"), _TEXT),
    **dict.fromkeys(("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"), _TEXT),
    **{f"tokenizer.ggml.{name}_token_id": _WHOLE for name in _SPECIAL},
    **dict.fromkeys(("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"), _FLAG),
}
_LISTS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.chat_templates"), _TEXT),
    **dict.fromkeys(("tokenizer.ggml.token_type", "tokenizer.ggml.suppress_tokens"), _WHOLE),
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
        check_regular(path, WisparseError)
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

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def dtype(self, name: str) -> str:
        """What a tensor is kept in where nothing else is asked for: bfloat16 if it is quantised, else its own."""
        stored = np.dtype(self.tensors[name].data.dtype)
        return stored.name if stored in (np.float32, np.float16) else "bfloat16"

    def values(self, name: str, exact: bool = False) -> np.ndarray:
        """A tensor's values in its `dtype`; quantised ones that are to be exact in float32.

        Raises:
            WeightsError: of a type that the gguf library cannot dequantise.
        """
        import gguf

        tensor = self.tensors[name]
        if tensor.data.dtype == self.dtype(name):
            return tensor.data
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise WeightsError(f"{self.path}: tensor {name}: the gguf library cannot dequantise {kind}") from None
        # BF16, which is no quantisation, is exact either way.
        return values if exact else values.astype(ml_dtypes.bfloat16)


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
        stored, expected = file.values(name, dtype == "float32"), shape[::-1] if turned else shape
        if stored.shape != expected:
            raise WeightsError(f"{file.path}: tensor {name}: expected shape {expected}, found {stored.shape}")
        layer = path.split(".")[-2] if path.startswith("blocks.") else ""
        if config.family == "llama" and layer in ("q", "k"):
            stored = _halves(stored, config.num_heads if layer == "q" else config.num_kv_heads)
        samples[path] = (shape, sample(stored.T if turned else stored))
        values[path] = place(stored, dtype, turned, f"{file.path}: tensor {name}")
    return jax.tree.unflatten(jax.tree.structure(shapes), [values[path] for path in leaves]), digest(config, samples)


def kept_dtypes(file: GgufFile, config: LlamaConfig) -> dict[str, str]:
    """What each parameter is kept in, by path, where nothing else is asked for."""
    return {path: file.dtype(gguf_name(path)) for path in flat(param_shapes(config))}


def gguf_name(path: str) -> str:
    """The name in a GGUF file of the parameter at a path such as `blocks.0.q.kernel`."""
    number = re.search(r"\d+", path)
    name = _NAMES[re.sub(r"\d+", "*", path)]
    return name.replace("*", number.group()) if number else name


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k with each head's features in two halves, from pairs side by side."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
