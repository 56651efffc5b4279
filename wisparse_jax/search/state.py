"""What a search has found so far, on disk, so that a killed one goes on to the same plan.

The results of long stages are a few arrays each, written by Orbax when the stage ends; a search that is started again
with the same model, text and settings reads what is there and computes the rest, dense runs and statistics included.
Evolutions ask for the losses of one population after another and are otherwise determined by their seed: what they were
told is kept every few populations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from wisparse_jax.errors import WisparseError, first_line
from wisparse_jax.files import read_json
from wisparse_jax.files.arrays import write_arrays
from wisparse_jax.interruption import goes_on_from

Arrays = dict[str, np.ndarray]
SPENT = "spent tokens"
UNFINISHED = ".orbax-checkpoint-tmp"
EVERY = 5  # populations between two writes


@dataclasses.dataclass
class Spent:
    """Tokens through the whole model, a backward pass counted as two."""

    tokens: float = 0.0


def kept(folder: Path) -> int:
    """How many results a former run has kept in a folder."""
    return sum(path.is_dir() and UNFINISHED not in path.name for path in folder.glob("[!.]*"))


def is_begun(folder: Path | None) -> bool:
    """Whether a search that was not ended keeps its results in a folder; what was left of an ended one goes."""
    if folder is None:
        return False
    shutil.rmtree(_removed(folder), ignore_errors=True)
    return (folder / "identity.json").is_file()


def remove_state(folder: str | Path | None) -> None:
    """Remove the folder that a search has kept its results in, when its plans are saved; with None, nothing."""
    if folder is None or not Path(folder).is_dir():
        return
    goes_on_from(None)
    # Renamed first: what a run leaves that is killed while it removes is no state, and goes with the next search.
    shutil.rmtree(_removed(folder), ignore_errors=True)
    with contextlib.suppress(OSError):
        Path(folder).rename(_removed(folder))
    for left in (_removed(folder), folder):  # the latter where it could not be renamed
        shutil.rmtree(left, ignore_errors=True)


def _removed(folder: str | Path) -> Path:
    return Path(folder).with_name(f"{Path(folder).name}.removed")


class SearchState:
    """Results by name; without a folder they are only computed."""

    def __init__(self, folder: Path | None = None, identity: str = ""):
        self._folder = folder
        self.read, self.found = 0, 0  # results that a former run had kept, and that this one had to find
        if folder is None:
            return
        known, new = folder / "identity.json", folder / "identity.json.new"
        shutil.rmtree(_removed(folder), ignore_errors=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A run that was killed at its beginning has left nothing, or only the latter.
            resumed = any(path != new for path in folder.iterdir())
            if resumed and not _is_of(known, identity):
                raise WisparseError(f"{folder}: is of another search, or damaged; remove it, or name another folder")
            if not resumed:
                new.write_text(json.dumps(identity) + "\n")
                new.rename(known)
        except OSError as error:
            raise WisparseError(f"{folder}: the state of the search cannot be kept here: {error}") from None
        # Orbax renames a folder once it is written; the unfinished one of a killed run stays until the next write.
        if found := kept(folder):
            print(f"wisparse: going on with the search in {folder}, results kept: {found}", file=sys.stderr)
            goes_on_from(folder)

    def keep(self, name: str, make: Callable[[], Arrays], spent: Spent | None = None) -> Arrays:
        """What was found under a name, or what `make` finds, which is kept; it adds the same to `spent` either way."""
        counter = Spent() if spent is None else spent
        if (found := self._read(name)) is None:
            before = counter.tokens
            found = make()
            self.found += 1
            self._write(name, found | {SPENT: np.asarray(counter.tokens - before)})
        else:
            self.read += 1
            counter.tokens += float(found.pop(SPENT))
        return found

    def journal(self, name: str) -> Callable[[Callable[[np.ndarray], np.ndarray], np.ndarray], np.ndarray]:
        """What asks questions and keeps the answers in their order; those that are known are not asked again.

        It is told each time whom to ask: held here, a problem would hold itself, and its dense run would stay on the
        device until the next collection of garbage.
        """
        known = self._read(name) or {}
        answers = [known[str(k)] for k in range(len(known))]
        at = 0

        def told(ask: Callable[[np.ndarray], np.ndarray], question: np.ndarray) -> np.ndarray:
            nonlocal at
            if at == len(answers):
                answers.append(ask(question))
                self.found += 1
                if len(answers) % EVERY == 0:
                    self._write(name, {str(k): answer for k, answer in enumerate(answers)})
            else:
                self.read += 1
            at += 1
            return answers[at - 1]

        return told

    def _place(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / re.sub(r"[^\w.-]", "_", name)

    def _read(self, name: str) -> Arrays | None:
        if self._folder is None or not self._place(name).is_dir():
            return None
        import orbax.checkpoint as ocp

        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                found = reader.restore(self._place(name).absolute())
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            where = self._place(name)
            goes_on_from(None)
            raise WisparseError(f"{where}: the state of the search is damaged: {first_line(error)}") from None
        return {key: np.asarray(value) for key, value in found.items()}

    def _write(self, name: str, arrays: Arrays) -> None:
        if self._folder is None:
            return
        write_arrays(self._place(name), {key: np.asarray(value) for key, value in arrays.items()}, overwrite=True)
        goes_on_from(self._folder)


def _is_of(file: Path, identity: str) -> bool:
    try:
        return read_json(file, str, WisparseError) == identity
    except WisparseError:
        return False


def identity_of(*parts: Any) -> str:
    """A digest of what determines a search: text, numbers, arrays."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            state.update(f"{part.dtype} {part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        else:
            state.update(json.dumps(part, sort_keys=True).encode())
        state.update(b"\0")
    return state.hexdigest()
