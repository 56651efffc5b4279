"""What a search has found so far, on disk, so that a killed one goes on to the same plan.

The results of long stages are a few arrays each, written by Orbax when the stage ends; a search that is started again
with the same model, text and settings reads what is there and computes the rest, dense runs and statistics included.
Evolutions ask for the losses of one population after another and are otherwise determined by their seed: what they were
told is kept every few populations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxlib import version as jaxlib_version

from wisparse_jax.errors import WisparseError, first_line
from wisparse_jax.files import expanded, read_json
from wisparse_jax.files.arrays import outside_event_loops, write_arrays

Arrays = dict[str, np.ndarray]
SPENT = "spent tokens"
LOCK = "lock"
UNFINISHED = ".orbax-checkpoint-tmp"
EVERY = 5  # populations between two writes


@dataclasses.dataclass
class Spent:
    """Tokens through the whole model, a backward pass counted as two."""

    tokens: float = 0.0


def _nobody(folder: Path | None) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a search keeps what it finds, and who is told when something is kept there, or, by None, no longer."""

    folder: Path
    tell: Callable[[Path | None], None] = _nobody

    @staticmethod
    def of(state: str | Path | Place | None) -> Place | None:
        """A place from what a caller names."""
        return Place(expanded(state)) if isinstance(state, str | Path) else state


def kept(folder: Path) -> int:
    """How many results a former run has kept in a folder."""
    return sum(path.is_dir() and UNFINISHED not in path.name for path in folder.glob("[!.]*"))


def is_begun(folder: Path | None) -> bool:
    """Whether a search that was not ended keeps its results in a folder; what was left of an ended one goes."""
    if folder is None:
        return False
    shutil.rmtree(_removed(folder), ignore_errors=True)
    return (folder / "identity.json").is_file()


def remove_state(state: str | Path | Place | None) -> None:
    """Remove the folder that a search has kept its results in, when its plans are saved; with None, nothing."""
    place = Place.of(state)
    if place is None or not place.folder.is_dir():
        return
    folder = place.folder
    place.tell(None)
    _LOCKS.pop(str(folder.resolve()), None)
    # Renamed first: what a run leaves that is killed while it removes is no state, and goes with the next search.
    shutil.rmtree(_removed(folder), ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rename(_removed(folder))
    for left in (_removed(folder), folder):  # the latter where it could not be renamed
        shutil.rmtree(left, ignore_errors=True)


class _Lock:
    """Held on a search's folder by this process for as long as the object lives."""

    def __init__(self, folder: Path):
        self._file = open(folder / LOCK, "a+")  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read(20).strip() or "that has only just begun"
            raise WisparseError(f"{folder}: in use by process {owner}, which searches for the same plan") from None
        except OSError:
            return  # a file system without locks
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()


_LOCKS: weakref.WeakValueDictionary[str, _Lock] = weakref.WeakValueDictionary()


def _locked(folder: Path) -> _Lock:
    """The lock of a folder, which the searches of one process share.

    Raises:
        WisparseError: another process holds it, which is named.
    """
    key = str(folder.resolve())
    if (lock := _LOCKS.get(key)) is None:
        lock = _LOCKS[key] = _Lock(folder)
    return lock


def check_unused(folder: Path | None) -> None:
    """Refuse the folder of a search that another process is at; nothing is written where there is none.

    Raises:
        WisparseError: with the number of the process.
    """
    if folder is not None and (folder / LOCK).is_file() and os.access(folder / LOCK, os.W_OK):
        _locked(folder)


def _removed(folder: str | Path) -> Path:
    return Path(folder).with_name(f"{Path(folder).name}.removed")


class SearchState:
    """Results by name; without a folder they are only computed."""

    def __init__(self, state: Path | Place | None = None, identity: str = ""):
        place = Place.of(state)
        folder = None if place is None else place.folder
        self._tell = _nobody if place is None else place.tell
        self._folder = folder
        self.read, self.found = 0, 0  # results that a former run had kept, and that this one had to find
        if folder is None:
            return
        known, new = folder / "identity.json", folder / "identity.json.new"
        shutil.rmtree(_removed(folder), ignore_errors=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(folder)
            # A run that was killed at its beginning has left nothing, or only these.
            resumed = any(path not in (new, folder / LOCK) for path in folder.iterdir())
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
            self._tell(folder)

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
                found = outside_event_loops(lambda: reader.restore(self._place(name).absolute()))
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            where = self._place(name)
            self._tell(None)
            raise WisparseError(f"{where}: the state of the search is damaged: {first_line(error)}") from None
        return {key: np.asarray(value) for key, value in found.items()}

    def _write(self, name: str, arrays: Arrays) -> None:
        if self._folder is None:
            return
        write_arrays(self._place(name), {key: np.asarray(value) for key, value in arrays.items()}, overwrite=True)
        self._tell(self._folder)


def _is_of(file: Path, identity: str) -> bool:
    try:
        return read_json(file, str, WisparseError) == identity
    except WisparseError:
        return False


def identity_of(*parts: Any) -> str:
    """A digest of what determines a search: text, numbers, arrays, and the JAX that computes, whose versions differ."""
    state = hashlib.sha256()
    for part in (*parts, jax.__version__, jaxlib_version.__version__):
        if isinstance(part, np.ndarray):
            state.update(f"{part.dtype} {part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        else:
            state.update(json.dumps(part, sort_keys=True).encode())
        state.update(b"\0")
    return state.hexdigest()
