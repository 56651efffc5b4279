"""The metadata of a GGUF file as a `config.json`: keys of the architecture are honoured, without effect, or refused.

What a key means, and what one that is not there stands for, is llama.cpp's to say.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from wisparse_jax.errors import ConfigError
from wisparse_jax.files import shown
from wisparse_jax.models.config import parse_config
from wisparse_jax.models.gguf import LAYER_NAMES, ROPE_FACTORS, GgufFile
from wisparse_jax.models.rope import Rope

# Mistral's and SmolLM's files are `llama` files.
FAMILIES = ("llama", "qwen2", "qwen3")
# The Llama 3 rule is stored as its factors alone; these are the constants of every release that has it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# Keys without the architecture's name before them.
_NEEDED = (
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"),
    "attention.layer_norm_rms_epsilon",
)
_HONOURED = {
    *_NEEDED,
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count"),
    *("rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
}
# Of other norms, of experts that there are none of, of yarn, which is refused, of how the file came about.
_WITHOUT_EFFECT = {
    *(
        "attention.layer_norm_epsilon",
        "expert_used_count",
        "tensor_data_layout",
        "vocab_size",
        "rope.scaling.finetuned",
    ),
    *("rope.scaling.original_context_length", "rope.scaling.yarn_log_multiplier"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
# Others change what is computed unless they have such a value; any key but these unless it is 0 or false.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("logit_scale", "embedding_scale", "residual_scale"), (0, 1)),
    **dict.fromkeys(("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"), (1,)),
    "rope.scaling.yarn_ext_factor": (0, -1),
    "attention.causal": (True,),
}
# Texts of tokens that end an answer, whatever the keys say: of texts, turns and messages.
_ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
    *("<end_of_utterance>", "<turn|>", "<|tool_response>", "[e~["),
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 - as DeepSeek has it
}
# What ends a piece of code that is filled in: by a key of its own, and by these texts where there is no such key.
_ENDS_OF_CODE = {
    "fim_pad": {"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"},
    "fim_rep": {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"},
    "fim_sep": {"<|file_sep|>"},
}
# A text that is no end where one of these sets of ends is there: `<|end|>` then closes a part of a message, and `</s>`
# is a word of the vocabulary.
_NO_ENDS = {
    "<|end|>": (
        *({"<|return|>", "<|call|>"}, {"<|return|>", "<|calls|>"}),
        *({"<|flush|>", "<|call|>"}, {"<|flush|>", "<|calls|>"}),
    ),
    "</s>": ({"<|tool_response>"},),
}
# Of a SentencePiece vocabulary whose file does not say.
_SENTENCEPIECE = {"bos": 1, "eos": 2, "unknown": 0}


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The contents of the `config.json` that the file's metadata stand for.

    Raises:
        ConfigError: a model that is not supported; names the file, the key and its value.
    """
    if (kind := file["general.type"]) not in (None, "model"):
        merged = "; an adapter is merged into its model first: llama-export-lora" if kind == "adapter" else ""
        raise ConfigError(f"{file.path}: general.type = {shown(kind)}: expected a model{merged}")
    family = file["general.architecture"]
    if family not in FAMILIES:
        raise ConfigError(
            f"{file.path}: general.architecture = {family!r} is not supported; expected one of {', '.join(FAMILIES)}"
        )
    for name in _NEEDED:
        if file[f"{family}.{name}"] is None:
            raise ConfigError(f"{file.path}: {family}.{name}: expected a value, found nothing")
    heads, hidden = file[f"{family}.attention.head_count"], file[f"{family}.embedding_length"]
    if heads < 1:
        raise ConfigError(f"{file.path}: {family}.attention.head_count = {heads}: expected a positive whole number")
    head_dim = file[f"{family}.attention.key_length"] or hidden // heads
    if head_dim < 1:
        raise ConfigError(f"{file.path}: a head dimension of {head_dim}: expected a positive whole number")
    for key in (f"{family}.attention.value_length", f"{family}.rope.dimension_count"):
        if file[key] not in (None, head_dim):
            raise ConfigError(f"{file.path}: {key} = {file[key]!r}: expected the head dimension, {head_dim}")
    _refuse_other_keys(file, family, head_dim)
    if suppressed := file[key := "tokenizer.ggml.suppress_tokens"]:
        raise ConfigError(f"{file.path}: {key} = {shown(suppressed)} is not supported; expected no such key")
    embedding = file.tensors.get("token_embd.weight")
    biases = {name: f"blk.0.{theirs}.bias" in file.tensors for name, theirs in LAYER_NAMES.items()}
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
        "bos_token_id": special_id(file, "bos"),
        "eos_token_id": special_id(file, "eos"),
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


def special_id(file: GgufFile, name: str) -> int | None:
    """The id of the token that has a part such as `bos`, or None where there is no such token."""
    default = _SENTENCEPIECE.get(name) if file["tokenizer.ggml.model"] == "llama" else None
    found = file[f"tokenizer.ggml.{name}_token_id"]
    return default if found is None else found


def end_tokens(file: GgufFile) -> list[int]:
    """The tokens that end an answer: those that the keys name, of a text, a turn, a message, and others by their text.

    Files that give an instruction model no end of a turn are common; llama.cpp finds it among the tokens.
    """
    tokens: list[str] = file["tokenizer.ggml.tokens"] or []
    named = [special_id(file, name) for name in ("eos", "eot", "eom", *_ENDS_OF_CODE)]
    texts = _ENDS.union(*(texts for name, texts in _ENDS_OF_CODE.items() if not _names_a_token(file, name, tokens)))
    ends = list(dict.fromkeys(i for i in (*named, *(i for i, t in enumerate(tokens) if t in texts)) if i is not None))
    there = {tokens[i] for i in ends if 0 <= i < len(tokens)}
    dropped = {text for text, beside in _NO_ENDS.items() if any(there >= some for some in beside)}
    return [i for i in ends if not (0 <= i < len(tokens) and tokens[i] in dropped)]


def _names_a_token(file: GgufFile, name: str, tokens: list[str]) -> bool:
    found = special_id(file, name)
    return found is not None and 0 <= found < len(tokens)


def _refuse_other_keys(file: GgufFile, family: str, head_dim: int) -> None:
    """Refuse the keys of the architecture that nothing here reads, unless they have no effect."""
    context, scale = file[f"{family}.context_length"], head_dim**-0.5
    for key in file:
        name = key.removeprefix(f"{family}.")
        if name == key or name in _HONOURED or name in _WITHOUT_EFFECT:
            continue
        value, neutral = file[key], _NEUTRAL.get(name, (0,))
        if value in neutral:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "attention.scale" and number and abs(value / scale - 1) < 1e-6:
            continue
        if name == "attention.sliding_window" and number and value >= context:
            continue
        expected = " or ".join(str(value) for value in neutral)
        raise ConfigError(f"{file.path}: {key} = {shown(value)} is not supported; expected {expected}, or no such key")


def _shortest(value: float | None, default: float) -> float:
    """A float32 of the metadata as it was written in decimals: 1e-05, not 9.999999747378752e-06."""
    return default if value is None else float(str(np.float32(value)))


def _rope_scaling(file: GgufFile, family: str, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The scaling of the file; one without a type is linear, and 0 stands for 1."""
    key = f"{family}.rope.scaling.type"
    if (kind := file[key]) not in (None, "none", "linear"):
        raise ConfigError(f"{file.path}: {key} = {shown(kind)} is not supported; expected none or linear")
    names = [f"{family}.rope.{name}" for name in ("scaling.factor", "scale_linear")]
    # The old name counts only where the new one is not there.
    name = next((name for name in names if file[name] is not None), names[0])
    factor = 1.0 if kind == "none" else _shortest(file[name], 1.0) or 1.0
    if ROPE_FACTORS not in file.tensors:
        return {"rope_type": "linear", "factor": factor} if factor != 1 else None
    if factor != 1:
        raise ConfigError(f"{file.path}: {name} = {factor:g} is not supported beside the tensor {ROPE_FACTORS}")
    factors = file.values(ROPE_FACTORS).astype(np.float32)
    found = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    rule = Rope.parse({"rope_theta": theta, "rope_scaling": found}, 8192).frequencies(head_dim)
    if factors.shape != rule.shape or not np.allclose(Rope(theta).frequencies(head_dim) / factors, rule, rtol=1e-3):
        raise ConfigError(f"{file.path}: tensor {ROPE_FACTORS}: expected the factors of Llama 3's rule, found others")
    return found
