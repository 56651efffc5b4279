"""The architecture of a Llama-family model, read from `config.json` alone."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from wisparse_jax.errors import ConfigError
from wisparse_jax.files import expanded, read_json, shown
from wisparse_jax.models.config_fields import refuse_unknown_fields
from wisparse_jax.models.other_checkpoints import refuse_other_folders, refuse_other_kinds
from wisparse_jax.models.parameters import axis_sizes, declared
from wisparse_jax.models.rope import Rope

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# As transformers calls a `mistral` model with `layer_types`, and saves it.
_ALIASES = {"ministral": "mistral"}
# What transformers takes for a field that the file does not have, by family.
_CONTEXT = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_BOS, _EOS = {"llama": 1, "mistral": 1}, {"llama": 2, "mistral": 2}
_LARGEST = 2**31 - 1  # sizes are int32
# What no weights speak against: far beyond any model there is; positions are exact in float32 up to 2**24.
_LARGEST_OF = {"num_hidden_layers": 4096, "max_position_embeddings": 2**24}

# Layers of a block in the order they run; each reads one of four inputs.
LAYERS = ("q", "k", "v", "o", "gate", "up", "down")
INPUT_GROUPS = {
    "attn_in": ("q", "k", "v"),
    "attn_out": ("o",),
    "mlp_in": ("gate", "up"),
    "mlp_mid": ("down",),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and switches of a decoder; hashable, so that it can be a static argument of `jax.jit`.

    `windows[i]` is block i's sliding window in tokens (a query sees itself and the `window - 1`
    positions before it), or None for full attention. Ids of special tokens that no token of the vocabulary has are
    left out: they can be neither read nor written.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    context: int
    tied_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    bos_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    family: str = "llama"

    def __post_init__(self) -> None:
        """Leave out special tokens that there are not."""
        for name in ("bos_token_ids", "eos_token_ids"):
            ids = tuple(i for i in getattr(self, name) if 0 <= i < self.vocab_size)
            object.__setattr__(self, name, ids)

    @property
    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """`[in, out]` of each of a block's seven linear layers."""
        sizes = axis_sizes(self)
        shapes = ([sizes[axis] for axis in declared(f"blocks.*.{name}.kernel").axes] for name in LAYERS)
        return {name: (size, out) for name, (size, out) in zip(LAYERS, shapes, strict=True)}

    @property
    def own_head(self) -> bool:
        """Whether the head is a matrix of its own, not the embedding."""
        return not self.tied_embeddings

    @property
    def layer_weights(self) -> tuple[int, ...]:
        """Number of weights of each layer, in the order of `LAYERS`: the weights of every mean sparsity."""
        return tuple(a * b for a, b in (self.layer_shapes[name] for name in LAYERS))


def read_config(path: str | Path) -> LlamaConfig:
    """Read `config.json` (a file, or a folder that holds one).

    Raises:
        ConfigError: not readable, not JSON, or a model that is not supported; names the field and its value.
    """
    path = expanded(path)
    if os.path.isdir(path):
        refuse_other_folders(path)
        path = path / "config.json"
    raw = read_json(path, dict[str, Any], ConfigError)
    try:
        return parse_config(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(raw: dict[str, Any]) -> LlamaConfig:
    """Translate the contents of a Hugging Face `config.json`, old (`rope_theta`, `rope_scaling`) or new
    (`rope_parameters`) style.

    Raises:
        ConfigError: a field is missing, malformed or asks for something that is not built; names field and value.
    """
    family = raw.get("model_type")
    family = _ALIASES.get(family, family) if isinstance(family, str) else family
    refuse_other_kinds(raw, FAMILIES)
    if family not in FAMILIES:
        raise ConfigError(f"model_type = {shown(family)} is not supported; expected one of {', '.join(FAMILIES)}")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"hidden_act = {shown(raw['hidden_act'])} is not supported; expected 'silu'")
    refuse_unknown_fields(raw, family)

    hidden, heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
    # An absent field has the family's own default; null is one for each head.
    absent = "num_key_value_heads" not in raw
    kv_heads = _size(raw, "num_key_value_heads", default=_KV_HEADS.get(family, heads) if absent else heads)
    if heads % kv_heads:
        raise ConfigError(f"num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}")
    # Qwen3's transformers class defaults head_dim to 128 whatever the other sizes are.
    head_dim = _size(raw, "head_dim", default=128 if family == "qwen3" else hidden // heads)
    if head_dim % 2:
        raise ConfigError(f"head_dim = {head_dim} is odd; rotary embeddings need an even size")
    if raw.get("head_dim") is None and family != "qwen3" and hidden % heads:
        raise ConfigError(f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}")
    blocks = _size(raw, "num_hidden_layers")
    context = _size(raw, "max_position_embeddings", default=_CONTEXT[family])
    attention_bias = _flag(raw, "attention_bias", False) if family in ("llama", "qwen3") else False
    return LlamaConfig(
        vocab_size=_size(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(raw, "intermediate_size"),
        num_blocks=blocks,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=_positive(raw, "rms_norm_eps", 1e-6),
        rope=Rope.parse(raw, context),
        context=context,
        tied_embeddings=_flag(raw, "tie_word_embeddings", False),
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias,
        mlp_bias=_flag(raw, "mlp_bias", False) if family == "llama" else False,
        qk_norm=family == "qwen3",
        windows=_windows(raw, family, blocks, context),
        bos_token_ids=_token_ids(raw, "bos_token_id", _BOS.get(family)),
        eos_token_ids=_token_ids(raw, "eos_token_id", _EOS.get(family)),
        family=family,
    )


def _windows(raw: dict[str, Any], family: str, blocks: int, context: int) -> tuple[int | None, ...]:
    length = None if raw.get("sliding_window", 4096) is None else _size(raw, "sliding_window", default=4096)
    if family == "llama":
        # No block looks at a window, but transformers' cache keeps no more tokens than that.
        if "sliding_window" in raw and length is not None and length < context:
            raise ConfigError(f"sliding_window = {length} is not supported for model_type = {family!r}; expected null")
        window = None
    else:
        window = length if family == "mistral" or _flag(raw, "use_sliding_window", False) else None
    types = raw.get("layer_types")
    if types is None:
        first = 0 if family == "mistral" else raw.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise ConfigError(f"max_window_layers = {first!r}: expected a whole number")
        return tuple(window if i >= first else None for i in range(blocks))
    if not isinstance(types, list) or len(types) != blocks:
        raise ConfigError(f"layer_types = {shown(types)}: expected a list of {blocks} names")
    known: dict[Any, int | None] = {"full_attention": None}
    if window is not None:
        known["sliding_attention"] = window
    for name in types:
        if not isinstance(name, str) or name not in known:
            without = "" if window is not None else ", as no sliding window is in use"
            raise ConfigError(f"layer_types holds {shown(name)}; expected {' or '.join(known)}{without}")
    return tuple(known[name] for name in types)


def _size(raw: dict[str, Any], field: str, default: int | None = None) -> int:
    value = raw.get(field)
    value = default if value is None else value
    largest = _LARGEST_OF.get(field, _LARGEST)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        there = "nothing" if field not in raw else shown(raw[field])
        raise ConfigError(f"{field}: expected a positive whole number up to {largest}, found {there}")
    return value


def _positive(raw: dict[str, Any], field: str, default: float) -> float:
    value = raw.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"{field}: expected a positive number, found {value!r}")
    return float(value)


def _flag(raw: dict[str, Any], field: str, default: bool) -> bool:
    value = raw.get(field, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{field}: expected true or false, found {value!r}")
    return value


def _token_ids(raw: dict[str, Any], field: str, default: int | None) -> tuple[int, ...]:
    value = raw.get(field, default)
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ConfigError(f"{field}: expected a token id or a list of them, found {value!r}")
    return ids
