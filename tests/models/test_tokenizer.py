"""Ids and text as transformers gives them, for every kind of tokenizer and every way to say what surrounds a text."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation.windows import split_windows
from wisparse_jax.inference import TextStream
from wisparse_jax.models.loading import load_tokenizer
from wisparse_jax.models.tokenizer import CERTAIN
from wisparse_jax.testing.tokenizers import KINDS, NAMED, write

TEXTS = ["hello", " the two", "two  ", "", "2026.\nthe", "naïve ☃", "a</s>b"]
TEMPLATES = {"none": None, "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>", "two": "<s> </s> $A <s>"}
SETTINGS: dict[str, dict[str, Any] | None] = {
    "no tokenizer_config": None,
    "nothing named": {},
    "named": NAMED,
    "BOS is EOS": {"bos_token": "</s>", "eos_token": "</s>"},
    "BOS added": NAMED | {"add_bos_token": True, "add_eos_token": False},
    "EOS added": NAMED | {"add_bos_token": False, "add_eos_token": True},
    "both added": NAMED | {"add_bos_token": True, "add_eos_token": True},
    "neither added": NAMED | {"add_bos_token": False, "add_eos_token": False},
}
CLASSES = [*CERTAIN, "LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer"]


@pytest.fixture(autouse=True)
def quiet() -> None:
    """What transformers says about tokenizer classes is not of interest here."""
    logging.getLogger("transformers").setLevel(logging.ERROR)


def theirs(folder: Path) -> Any:
    """transformers' own tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def put_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What transformers puts before and after a text, by a text of one token."""
    whole, (middle,) = tokenizer.encode("h"), tokenizer.encode("h", add_special_tokens=False)[-1:]
    at = len(whole) - 1 - whole[::-1].index(middle)
    start = at + 1 - len(tokenizer.encode("h", add_special_tokens=False))
    return whole[:start], whole[at + 1 :]


@pytest.mark.parametrize("kind", ["byte level", "sentence piece"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_ids_are_transformers_without_what_follows_a_text(
    tmp_path: Path, kind: str, template: str, settings: str
) -> None:
    raw = write(tmp_path, kind, TEMPLATES[template], SETTINGS[settings])
    ours, expected = load_tokenizer(tmp_path), theirs(tmp_path)
    _, after = put_around(expected)
    for text in TEXTS:
        ids = expected.encode(text)
        assert ours.encode(text) == ids[: len(ids) - len(after)]
        assert ours.encode(text, bos=False) == expected.encode(text, add_special_tokens=False)
        assert raw.encode(text).ids == [*ours.encode(text), *after]  # and the file's own


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("kind", ["byte level", "sentence piece"])
def test_ids_are_transformers_whatever_class_is_named(tmp_path: Path, kind: str, name: str, family: str) -> None:
    raw = write(tmp_path, kind, "<s> $A", NAMED | {"tokenizer_class": name}, family)
    ours, expected = load_tokenizer(tmp_path), theirs(tmp_path)
    assert type(ours.inner) is type(expected)
    assert ours.inner.special_tokens_map == expected.special_tokens_map
    for text in TEXTS:
        assert ours.encode(text) == expected.encode(text)
        if kind == "byte level":  # a Llama class over such a file is what distilled models come with
            assert ours.encode(text) == raw.encode(text).ids


def test_a_tokenizer_does_not_wait_for_pytorch(tmp_path: Path) -> None:
    """Where it is installed; here a stand-in that says who imports it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('PyTorch was imported')")
    (tmp_path / "torch-2.99.dist-info").mkdir()
    (tmp_path / "torch-2.99.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.99\n")
    code = "from transformers.utils import is_torch_available; from wisparse_jax import load_tokenizer;"
    code += "print(is_torch_available(), load_tokenizer('demo').decode(load_tokenizer('demo').encode('the sea')))"
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True the sea\n", "")


def test_a_template_after_another_post_processor(tmp_path: Path) -> None:
    raw = write(tmp_path, "byte level", None, None)
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    raw.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])  # pyright: ignore
    raw.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours.prefix == (1,) and ours.encode("hello") == theirs(tmp_path).encode("hello") == raw.encode("hello").ids


@pytest.mark.parametrize("template", TEMPLATES)
def test_windows_of_text_hold_nothing_that_ends_a_text(tmp_path: Path, template: str) -> None:
    write(tmp_path, "byte level", TEMPLATES[template], {"bos_token": "</s>", "eos_token": "</s>"})
    tokenizer = load_tokenizer(tmp_path)
    prefix, text = list(tokenizer.prefix), "the two of them " * 8
    windows = split_windows(tokenizer, text, 16)
    assert (windows[:, : len(prefix)] == prefix).all() and len(windows) > 2
    ids = theirs(tmp_path).encode(text, add_special_tokens=False)
    body = windows[:, len(prefix) :].reshape(-1).tolist()
    assert body == ids[: len(body)]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("settings", [None, NAMED | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}])
def test_a_sentence_piece_model_alone_is_loaded(tmp_path: Path, kind: str, settings: dict[str, Any] | None) -> None:
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("the two of them went to the other harbour and came home again\n" * 50)
    special = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=280, model_type=kind, **special
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, expected = load_tokenizer(tmp_path), theirs(tmp_path)
    for line in ("the two", " harbour ☃", "", "went  home"):
        assert ours.encode(line) == expected.encode(line)
    if settings is None or kind == "bpe":  # transformers runs a Llama class with the rules of BPE whatever the model is
        own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode("the two")
        assert ours.encode("the two", bos=False) == own
    assert ours.prefix == (() if settings is None else (1,))
    assert ours.decode(ours.encode(" home"), after=ours.encode("went")) == " home"


@pytest.mark.parametrize(("family", "named"), [("llama", False), ("llama", True), ("qwen2", False), ("mistral", False)])
def test_a_vocabulary_and_its_merges_are_loaded_where_their_kind_is_known(
    tmp_path: Path, family: str, named: bool
) -> None:
    raw = write(tmp_path, "byte level", None, NAMED | {"tokenizer_class": "GPT2Tokenizer"} if named else None, family)
    raw.model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    if family == "qwen2" or named:
        for text in TEXTS[:-1]:
            assert load_tokenizer(tmp_path).encode(text, bos=False) == raw.encode(text).ids
        return
    with pytest.raises(WisparseError, match=r"vocab\.json as it is: expected tokenizer\.json, or merges\.txt and a"):
        load_tokenizer(tmp_path)


# Prompts that end in a space, in part of a word, in a character of many bytes, in nothing; and texts to go on with.
PROMPTS = ["two", "two ", "two  ", "", " ", "he", "the two.", "☃", "two\n", "</s>"]
CONTINUATIONS = [" 2026", "2026 two", "llo", "  two", " ☃ two ☃", "naïve", "\n", " </s>two", ""]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["none", "bos"])
def test_a_stream_is_transformers_text_after_the_prompt(tmp_path: Path, kind: str, template: str) -> None:
    write(tmp_path, kind, TEMPLATES[template], NAMED)
    tokenizer, expected = load_tokenizer(tmp_path), theirs(tmp_path)
    for prompt in PROMPTS:
        for continuation in CONTINUATIONS:
            ids = tokenizer.encode(prompt)
            new = tokenizer.encode(prompt + continuation, bos=False)[len(tokenizer.encode(prompt, bos=False)) :]
            whole = expected.decode(ids + new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            before = expected.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            stream = TextStream(tokenizer.decode, ids, tokenizer.open_byte)
            pieces = [stream.add([token]) for token in new] + [stream.rest()]
            assert whole.startswith(before)
            assert "".join(pieces) == tokenizer.decode(new, after=ids) == whole[len(before) :]


def test_llama_2_keeps_the_space_of_a_continuation(tmp_path: Path) -> None:
    write(tmp_path, "sentence piece", "<s> $A", NAMED)
    tokenizer = load_tokenizer(tmp_path)
    prompt, new = tokenizer.encode("two"), tokenizer.encode("two 2026", bos=False)[1:]
    assert tokenizer.decode(new) == "2026" and tokenizer.decode(new, after=prompt) == " 2026"
    stream = TextStream(tokenizer.decode, prompt, tokenizer.open_byte)
    assert "two" + stream.add(new) + stream.rest() == "two 2026"


@pytest.mark.parametrize("kind", ["byte level", "sentence piece", "metaspace"])
@pytest.mark.parametrize("broken", [False, True])
def test_a_prompt_may_end_within_a_character(tmp_path: Path, kind: str, broken: bool) -> None:
    write(tmp_path, kind, "<s> $A", NAMED)
    tokenizer, expected = load_tokenizer(tmp_path), theirs(tmp_path)
    ids = tokenizer.encode("two ☃")
    tail = tokenizer.encode(" two")[1:]
    for cut in (1, 2):
        prompt, new = ids[:-cut], [*([] if broken else ids[-cut:]), *tail]
        whole = expected.decode([*prompt, *new], skip_special_tokens=True)
        stream = TextStream(tokenizer.decode, prompt, tokenizer.open_byte)
        pieces = "".join([stream.add([token]) for token in new] + [stream.rest()])
        assert pieces == tokenizer.decode(new, after=prompt)
        # What the prompt shows of the unfinished character, if anything, is replaced by it.
        assert whole.endswith(pieces) and ("☃" in pieces) == (not broken) and "two" in pieces


def test_bytes_that_a_later_byte_undoes_wait(tmp_path: Path) -> None:
    """In a run of bytes that is no text every byte is a question mark, also those that would be letters."""
    write(tmp_path, "sentence piece", None, NAMED)
    tokenizer = load_tokenizer(tmp_path)
    letter, lead = (tokenizer.inner.convert_tokens_to_ids(name) for name in ("<0x41>", "<0xE2>"))
    prompt = tokenizer.encode("two")
    stream = TextStream(tokenizer.decode, prompt, tokenizer.open_byte)
    assert stream.add([letter]) == ""
    assert stream.add([lead]) + stream.rest() == tokenizer.decode([letter, lead], after=prompt) == "\ufffd\ufffd"
    stream = TextStream(tokenizer.decode, prompt, tokenizer.open_byte)
    assert stream.add([letter]) == "" and stream.add(tokenizer.encode("he", bos=False)) == "A he"


def test_half_characters_wait_for_their_other_half() -> None:
    encoded = "naïve ☃!".encode()
    stream = TextStream(lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    pieces = [stream.add([byte]) for byte in encoded]
    assert "".join(pieces) + stream.rest() == "naïve ☃!" and "\ufffd" not in "".join(pieces)
    broken = TextStream(lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    assert broken.add(encoded[:3]) == "na" and broken.rest() == "\ufffd"


def test_a_prompt_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "byte level", None, NAMED)
    tokenizer = load_tokenizer(tmp_path)
    text = b"two \xff".decode("utf-8", "surrogateescape")  # as Python reads the command line
    with pytest.raises(WisparseError, match=r"not UTF-8 text: found '\\udcff', .* at position 4"):
        tokenizer.encode(text)
