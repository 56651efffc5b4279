"""Small tokenizers of every kind that models of these families come with, written as model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ["<unk>", "<s>", "</s>"]
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


def byte_level() -> Tokenizer:
    """A tokenizer as Llama 3's and Qwen's: every byte a letter, a space part of the word after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, "he", "ll", "Ġt"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("h", "e"), ("l", "l"), ("Ġ", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_piece() -> Tokenizer:
    """A tokenizer as Llama 2's: a space goes before a text, and comes off again; unknown characters are bytes."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *(f"<0x{b:02X}>" for b in range(256))])}
    for token in ["▁", *"abcdefghijklmnopqrstuvwxyz0126.,", "he", "▁t", "▁two"]:
        vocab[token] = len(vocab)
    merges = [("h", "e"), ("▁", "t"), ("t", "w"), ("▁t", "wo")]
    vocab |= {"tw": len(vocab), "wo": len(vocab) + 1}
    merges.insert(2, ("w", "o"))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def metaspace() -> Tokenizer:
    """A tokenizer as Mistral's: the same by a pre-tokenizer."""
    tokenizer = sentence_piece()
    tokenizer.normalizer = None  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    return tokenizer


def metaspace_decoder() -> Tokenizer:
    """The same back to text by the decoder that goes with it, for which bytes are only names."""
    tokenizer = metaspace()
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    return tokenizer


def word_pieces() -> Tokenizer:
    """A tokenizer with the end of a word marked, which is a space unless nothing follows."""
    letters = "abcdefghijklmnopqrstuvwxyz0126.,☃"
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters, *(f"{c}</w>" for c in letters)])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


KINDS = {
    "byte level": byte_level,
    "sentence piece": sentence_piece,
    "metaspace": metaspace,
    "metaspace decoder": metaspace_decoder,
    "suffix": word_pieces,
}


def write(
    folder: Path,
    kind: str,
    template: str | None = None,
    settings: dict[str, Any] | None = None,
    family: str | None = "llama",
) -> Tokenizer:
    """Write a folder's tokenizer.json, tokenizer_config.json and config.json (None: no such file).

    A template such as "<s> $A </s>" is what the tokenizer itself puts around a text.
    """
    tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens(SPECIAL)
    if template is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    folder.mkdir(exist_ok=True, parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if family is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return tokenizer
