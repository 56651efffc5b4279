"""Tokenizer files that are damaged or hostile: refused before they are loaded, contained where they are used."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import warnings
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
    said = None
    for interpreter in _interpreters():
        if (said := _tried(interpreter, path)) is not None:
            break
    if said is None:
        warnings.warn(
            f"{path}: not tried in a process of its own first, as no Python was found that starts and imports "
            "tokenizers; a damaged file may end this process",
            stacklevel=4,
        )
        try:
            tokenizer_probe.check(str(path))
        except (ValueError, RecursionError, AttributeError, OSError) as error:
            said = first_line(error)
    if said not in (None, "usable"):
        raise WisparseError(f"{path}: the tokenizer is not usable: {said}")


def _interpreters() -> Iterator[str]:
    """Pythons of this version that may be there; what embeds Python, or was frozen, is none, and would run itself."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if sys.executable and not getattr(sys, "frozen", False) and re.match(r"python[\d.]*$", Path(sys.executable).name):
        yield sys.executable
    for place in (sys.exec_prefix, sys.base_exec_prefix):
        found = os.path.join(place, "bin", name)
        if found != sys.executable and os.access(found, os.X_OK):
            yield found


def _tried(interpreter: str, path: Path) -> str | None:
    """`usable`, or why a tokenizer is not; None where the interpreter cannot try it.

    Raises:
        WisparseError: the trial does not end.
    """
    places = [os.path.abspath(place) for place in sys.path]
    command = [interpreter, "-I", tokenizer_probe.__file__, str(path), json.dumps(places)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise WisparseError(f"{path}: the tokenizer is not usable: a trial did not end in {SECONDS} s") from None
    except OSError:
        return None
    lines = done.stdout.strip().splitlines()
    if lines[:1] != [tokenizer_probe.STARTED]:
        return None
    return lines[-1] if len(lines) > 1 else f"a trial ended with code {done.returncode}"


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
