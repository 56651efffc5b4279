"""Hostile tokenizers are refused before they are loaded, or contained."""

from __future__ import annotations

import base64
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wisparse_jax.errors import WisparseError
from wisparse_jax.models import tokenizer_check
from wisparse_jax.models.loading import load_tokenizer
from wisparse_jax.models.tokenizer_check import contained

Raw = dict[str, Any]


def bpe() -> Raw:
    vocab = {"<unk>": 0, **{chr(i): i - 31 for i in range(32, 127)}}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>", "fuse_unk": True}
    return {"version": "1.0", "added_tokens": [], "normalizer": None, "model": model} | dict.fromkeys(
        ("truncation", "padding", "pre_tokenizer", "post_processor", "decoder")
    )


def unigram(charsmap: bytes) -> Raw:
    vocab = [["<unk>", 0.0], ["a", -1.0], ["b", -1.0]]
    normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    return bpe() | {"normalizer": normalizer, "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab}}


def replace(pattern: dict[str, str], content: str) -> Raw:
    return {"type": "Replace", "pattern": pattern, "content": content}


def write(folder: Path, raw: Raw) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder / "tokenizer.json"


def test_a_sound_one_is_usable(tmp_path: Path) -> None:
    write(tmp_path, bpe() | {"normalizer": replace({"String": " "}, "_")})
    assert load_tokenizer(tmp_path).encode("a b") == [66, 64, 67]


def changed(change: Callable[[Raw], object]) -> Raw:
    raw = bpe()
    change(raw)
    return raw


DOUBLED = {"type": "Sequence", "normalizers": [replace({"String": "q"}, "qq")] * 40}
HOSTILE: dict[str, tuple[Raw, str]] = {
    "id beyond int32": (
        changed(lambda raw: raw["model"]["vocab"].update({"z": 2**31})),
        "token 'z' has the id 2147483648, beyond int32",
    ),
    "id beyond uint32": (changed(lambda raw: raw["model"]["vocab"].update({"z": 2**40})), ""),
    "negative id": (changed(lambda raw: raw["model"]["vocab"].update({"z": -1})), ""),
    "unknown token missing": (
        changed(lambda raw: raw["model"]["vocab"].pop("<unk>")),
        "Unk token `<unk>` not found in the vocabulary",
    ),
    "no trie": (unigram(struct.pack("<I", 0) + b"abc\0"), "index out of bounds"),
    "a trie that points elsewhere": (unigram(struct.pack("<I", 64) + b"\x55" * 64 + b"abc\0"), "index out of bounds"),
    "a trie that is cut": (unigram(b"\xff\xff\xff\xf0abc"), "Precompiled: Error"),
    "grows by a few": (bpe() | {"normalizer": DOUBLED}, "the normalizer makes a text up to 1.1e+12 times as long"),
    "grows at once": (
        bpe() | {"normalizer": replace({"Regex": ""}, "x" * 100)},
        "the normalizer makes a text up to 101 times as long",
    ),
    "grows when decoded": (
        bpe() | {"decoder": {"type": "Sequence", "decoders": [replace({"String": "q"}, "q" * 9)] * 9}},
        "the decoder makes a text up to 3.87e+08 times as long",
    ),
    "not a tokenizer": ({}, ""),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_ones_are_one_line(tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    raw, message = HOSTILE[case]
    path = write(tmp_path, raw)
    with pytest.raises(WisparseError, match=re.escape(f"{path}: the tokenizer is not usable: {message}")):
        load_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""


def test_what_ends_the_process_ends_only_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, bpe())
    probe = tmp_path / "probe.py"
    monkeypatch.setattr(tokenizer_check.tokenizer_probe, "__file__", str(probe))
    probe.write_text("print('trial', flush=True); import os; os.abort()")
    with pytest.raises(WisparseError, match=re.escape(f"{path}: the tokenizer is not usable: a trial ended with code")):
        load_tokenizer(tmp_path)
    probe.write_text("while True: pass")
    monkeypatch.setattr(tokenizer_check, "SECONDS", 0.3)
    with pytest.raises(WisparseError, match="a trial did not end in"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "merges.txt"])
def test_pipes_and_large_files_are_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, bpe())
    if name != "tokenizer.json":
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / "pipe").rename(tmp_path / name)
        with pytest.raises(WisparseError, match=re.escape(f"{tmp_path / name}: not a regular file")):
            load_tokenizer(tmp_path)
        (tmp_path / name).unlink()
    with open(tmp_path / name, "ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(WisparseError, match=re.escape(f"{tmp_path / name}: larger than 268,435,456 bytes")):
        load_tokenizer(tmp_path)


class PanicException(BaseException):
    """Named as that of the Rust library, which is no Exception either."""


def raising(error: BaseException) -> None:
    with contained("what"):
        raise error


def test_errors_of_the_library_are_contained_and_interruptions_not() -> None:
    for error in (PanicException("index\nout"), RuntimeError("index\nout")):
        with pytest.raises(WisparseError, match=r"^what: index$"):
            raising(error)
    for other in (KeyboardInterrupt(), WisparseError("ours")):
        with pytest.raises(type(other)) as caught:
            raising(other)
        assert caught.value is other


def test_a_trial_imports_from_where_its_caller_does(tmp_path: Path) -> None:
    """A Python that has nothing installed, with what it imports on PYTHONPATH, as in the user's site or a target."""
    write(tmp_path, bpe())
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    places = [entry for entry in map(os.path.abspath, [".", *sys.path]) if os.path.isdir(entry)]
    program = f"""
from pathlib import Path
from wisparse_jax.models.tokenizer_check import check_tokenizer
check_tokenizer(Path({str(tmp_path)!r}), ["tokenizer.json"])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "PYTHONWARNINGS": "error"}
    # Less memory than the trial allows itself, which may not be raised.
    limited = ["bash", "-c", 'ulimit -v 7000000; exec "$@"', "bash", str(base), "-c", program]
    done = subprocess.run(limited, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    write(tmp_path, HOSTILE["grows by a few"][0])
    done = subprocess.run(limited, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "the normalizer makes a text up to 1.1e+12 times as long" in done.stderr


def test_a_program_that_embeds_python_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    application = tmp_path / "application"
    application.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    application.chmod(0o755)
    folder = tmp_path / "model"
    folder.mkdir()
    for executable in (str(application), "", None):
        monkeypatch.setattr(sys, "executable", executable)
        write(folder, bpe())
        assert load_tokenizer(folder).encode("ab") == [66, 67]
        write(folder, HOSTILE["no trie"][0])
        with pytest.raises(WisparseError, match="the tokenizer is not usable: index out of bounds"):
            load_tokenizer(folder)
    assert not (tmp_path / "started").exists()


def test_where_nothing_can_be_tried_it_is_said_and_the_rest_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_check, "_interpreters", lambda: iter(["/no/such/python", "/bin/true"]))
    write(tmp_path, bpe())
    with pytest.warns(UserWarning, match="not tried in a process of its own first, as no Python was found"):
        assert load_tokenizer(tmp_path).encode("ab") == [66, 67]
    for case in ("grows by a few", "grows at once", "grows when decoded"):
        raw, message = HOSTILE[case]
        write(tmp_path, raw)
        with (
            pytest.warns(UserWarning, match="not tried in a process"),
            pytest.raises(WisparseError, match=re.escape(f"the tokenizer is not usable: {message}")),
        ):
            load_tokenizer(tmp_path)
