"""Tokenizer files that are damaged or hostile: refused before they are loaded, contained where they are used."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from wisparse_jax.errors import WisparseError, first_line
from wisparse_jax.files import check_regular
from wisparse_jax.models import tokenizer_probe

LARGEST = 256 << 20  # bytes of a file; the vocabularies of today have some 30 million
SECONDS = 60


def check_tokenizer(folder: Path, files: Iterable[str]) -> None:
    """Refuse a folder whose tokenizer would hang, fill the memory or end the process.

    Args:
        folder: the model's folder.
        files: the names of files that a tokenizer is made of; a tokenizer.json among them is tried in a process of
            its own, which takes a tenth of a second, and one second for the largest vocabularies.

    Raises:
        WisparseError: what is not a regular file or too large, ids beyond int32, a character that cannot be encoded, a
            damaged or growing normaliser; names the file.
    """
    for path in (folder / name for name in files):
        if os.path.lexists(path) and not path.is_dir():
            check_regular(path, WisparseError)
            if path.stat().st_size > LARGEST:
                raise WisparseError(f"{path}: larger than {LARGEST:,} bytes, which no such file should be")
    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        return
    command = [sys.executable, "-I", tokenizer_probe.__file__, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise WisparseError(f"{path}: the tokenizer is not usable: a trial did not end in {SECONDS} s") from None
    said = done.stdout.strip().splitlines()[-1:]
    if said != ["usable"]:
        reason = said[0] if said else f"a trial ended with code {done.returncode}"
        raise WisparseError(f"{path}: the tokenizer is not usable: {reason}")


@contextlib.contextmanager
def contained(what: str) -> Iterator[None]:
    """An error of the Rust library, panics included, as one of ours that begins with `what`.

    Raises:
        WisparseError: the body raised another error.
    """
    try:
        yield
    except WisparseError:
        raise
    except BaseException as error:
        # A panic is no Exception, but neither is an interruption.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = first_line(error)
        raise WisparseError(f"{what}: {reason}") from None
