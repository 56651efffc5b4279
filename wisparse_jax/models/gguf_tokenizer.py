"""The tokenizer of a GGUF file, written as Hugging Face's tokenizer files."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from wisparse_jax.errors import WisparseError
from wisparse_jax.files import shown
from wisparse_jax.models.gguf import GgufFile
from wisparse_jax.models.gguf_config import end_tokens, special_id
from wisparse_jax.models.tokenizer_check import contained

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # kinds of token in tokenizer.ggml.token_type

# How byte-level vocabularies cut a text before merging, by the name in tokenizer.ggml.pre.
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_LETTERS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "tekken": _TEKKEN} | dict.fromkeys(
    ("qwen2", "deepseek-r1-qwen"), _QWEN2
)
_SINGLE_DIGITS = ("smollm",)
_PLAIN = ("gpt-2",)
# Of these a text that is a token as a whole is that token, whatever its merges would give.
_WHOLE_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")


def tokenizer_files(file: GgufFile) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and the chat templates of a GGUF file, by name.

    Raises:
        WisparseError: the file holds no tokenizer, or one of a kind that is not supported; names the key.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = file["tokenizer.ggml.tokens"], file["tokenizer.ggml.token_type"]
    if not tokens or not kinds or len(tokens) != len(kinds):
        raise WisparseError(f"{file.path}: tokenizer.ggml.tokens and .token_type: expected one kind for every token")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]  # as llama.cpp names them
    first: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if (other := first.setdefault(token, i)) != i:
            raise WisparseError(f"{file.path}: tokenizer.ggml.tokens: {shown(token)} is token {other} and token {i}")
    model = file["tokenizer.ggml.model"]
    if model not in ("gpt2", "llama"):
        raise WisparseError(f"{file.path}: tokenizer.ggml.model = {model!r} is not supported; expected gpt2 or llama")
    marked = list(zip(tokens, kinds, strict=True))
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: special_id(file, key) for name, key in names.items()}
    for name, i in ids.items():
        if i is not None and not 0 <= i < len(tokens):
            key = f"tokenizer.ggml.{names[name]}_token_id"
            raise WisparseError(f"{file.path}: {key} = {i}: expected a token below {len(tokens)}")
    named = file["tokenizer.chat_templates"] or ()
    if odd := [name for name in named if not re.fullmatch(r"\w[\w-]*", name)]:
        raise WisparseError(f"{file.path}: tokenizer.chat_templates holds {shown(odd[0])}: expected names of templates")
    # What ends an answer is no text of it, whatever kind of token the file says that it is.
    ends = {tokens[i] for i in end_tokens(file) if 0 <= i < len(tokens)}
    control = [token for token, kind in marked if kind == _CONTROL or token in ends]
    special = {name: tokens[i] for name, i in ids.items() if i is not None}
    with contained(f"{file.path}: no tokenizer can be made of it"):
        built = _byte_level(file, tokens) if model == "gpt2" else _sentencepiece(file, marked)
        built.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
        built.add_tokens(
            [AddedToken(t, special=False, normalized=False) for t, k in marked if k == _USER_DEFINED and t not in ends]
        )
        if _adds_bos(file, model) and "bos_token" in special:
            bos = special["bos_token"]
            built.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, ids["bos_token"])]
            )
        wrapped = PreTrainedTokenizerFast(tokenizer_object=built, clean_up_tokenization_spaces=False, **special)
        templates = {name: file[f"tokenizer.chat_template.{name}"] for name in named}
        if (default := file["tokenizer.chat_template"]) is not None:
            templates["default"] = default
        if templates:
            wrapped.chat_template = templates["default"] if list(templates) == ["default"] else templates
        with tempfile.TemporaryDirectory() as folder:
            wrapped.save_pretrained(folder)
            files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
            return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _adds_bos(file: GgufFile, model: str) -> bool:
    """Whether a text begins with the beginning-of-sequence token; where the file does not say, as llama.cpp does."""
    stated = file["tokenizer.ggml.add_bos_token"]
    if stated is not None:
        return bool(stated)
    return model == "llama" or file["tokenizer.ggml.pre"] in _WHOLE_FIRST


def _byte_level(file: GgufFile, tokens: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    rule = file["tokenizer.ggml.pre"]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule not in _SPLITS)
    if rule in _SPLITS:
        parts = [pre_tokenizers.Split(Regex(_SPLITS[rule]), behavior="isolated"), byte_level]
    elif rule in _SINGLE_DIGITS:
        parts = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    elif rule in _PLAIN:
        parts = [byte_level]
    else:
        known = ", ".join([*_SPLITS, *_SINGLE_DIGITS, *_PLAIN])
        raise WisparseError(f"{file.path}: tokenizer.ggml.pre = {rule!r} is not supported; expected one of {known}")
    merges = file["tokenizer.ggml.merges"]
    if not merges:
        raise WisparseError(f"{file.path}: tokenizer.ggml.merges: expected the merges of a byte-level vocabulary")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ", 1) for merge in merges)]
    built = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=rule in _WHOLE_FIRST))
    if _SPLITS.get(rule) == _QWEN2:
        built.normalizer = normalizers.NFC()
    built.pre_tokenizer = pre_tokenizers.Sequence(parts)
    built.decoder = decoders.ByteLevel()
    return built


def _sentencepiece(file: GgufFile, tokens: list[tuple[str, int]]) -> Any:
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    scores = file["tokenizer.ggml.scores"]
    if not scores or len(scores) != len(tokens):
        raise WisparseError(f"{file.path}: tokenizer.ggml.scores: expected one score for every token")
    vocabulary = {token: i for i, (token, _) in enumerate(tokens)}
    pieces = {token: score for (token, kind), score in zip(tokens, scores, strict=True) if kind == _NORMAL}
    prefix = file["tokenizer.ggml.add_space_prefix"] is not False
    made = LlamaTokenizer(vocabulary, generate_merges(vocabulary, pieces), add_prefix_space=prefix)
    return made.backend_tokenizer
