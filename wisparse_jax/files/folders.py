"""Writing a folder that appears whole or not at all.

A folder is written beside its place, inside a staging folder `.NAME.partial-XXXXXXXX` that holds

    folder/   what is being written
    lock      locked by the process that writes, for as long as it lives

and is renamed when everything is on the disk. A staging folder whose lock nobody holds was left by a run that was
killed; the next one that writes to the same place removes it and says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from wisparse_jax.errors import WisparseError
from wisparse_jax.files.paths import expanded
from wisparse_jax.interruption import shielded, unfinished

_CONTENT, _LOCK = "folder", "lock"
_LONGEST = 200  # bytes of the target's name in that of its staging folder; names have at most 255


def check_new_folder(out: str | Path, error: type[WisparseError]) -> None:
    """Refuse a place where no new folder can be written, before the work that is to be written there.

    Raises:
        WisparseError: of the kind `error`: something is there already, a parent is a file or may not be written to, or
            the name is too long.
    """
    out = expanded(out)
    try:
        os.lstat(out)
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        raise error(f"{out}: cannot be written: a folder above it is a file") from None
    except (OSError, ValueError) as problem:  # a ValueError for a name with a NUL in it
        raise error(f"{out}: cannot be written: {_reason(problem)}") from None
    else:
        raise error(f"{out}: exists already; nothing is overwritten")
    if out.name in ("", ".."):
        raise error(f"{out}: cannot be written: expected the name of a new folder")
    above = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise error(f"{out}: cannot be written: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise error(f"{out}: cannot be written: no permission to write to {above}, or it is read-only")
    # What a user may do is not all: quotas, network shares and /proc refuse when something is made.
    trial = above / f"{_prefix(out)}{secrets.token_hex(4)}"
    try:
        with unfinished(trial):
            trial.mkdir(mode=0o700)
    except OSError as problem:
        raise error(f"{out}: cannot be written: {_reason(problem)}") from None


@contextlib.contextmanager
def new_folder(out: str | Path, error: type[WisparseError]) -> Iterator[Path]:
    """A folder to write into, which becomes `out` if the body ends well and is removed if it does not.

    Everything is on the disk before the rename. Missing parents are made. The body should do nothing but write: an
    OSError in it is reported as one of writing. Two processes may write to one place at a time: the first to finish
    has it, the other is refused.

    Raises:
        WisparseError: of the kind `error`, as `check_new_folder`; also when `out` has come to exist meanwhile, or the
            disk is full.
    """
    check_new_folder(out, error)
    target = expanded(out).absolute()
    made: list[Path] = []
    try:
        made += _make_parents(target.parent)
        remove_litter(target)
        with _staging(target) as staging:
            content = staging / _CONTENT
            content.mkdir()
            yield content
            _synchronise(content)
            with shielded():
                if os.path.lexists(target):  # an empty folder would be replaced
                    raise FileExistsError
                content.rename(target)
            _synchronise_one(target.parent)
    except BaseException as problem:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if not isinstance(problem, OSError):
            raise
        if os.path.lexists(target):
            raise error(f"{out}: exists already; nothing is overwritten") from None
        raise error(f"{out}: cannot be written: {_reason(problem)}") from None


def remove_litter(out: Path) -> None:
    """Remove what killed runs left of the folder `out`, each with a line on standard error that names it."""
    for staging in sorted(out.parent.glob(f"{glob.escape(_prefix(out))}*")):
        if staging.is_dir() and not staging.is_symlink() and _remove_unowned(staging):
            print(f"wisparse: removed {staging}, which a killed run had left", file=sys.stderr)


def _remove_unowned(staging: Path) -> bool:
    """Remove a staging folder that nobody writes into; returns whether anything of a run was in it."""
    # An empty one is removed: its owner is dead, or has only just begun and begins again.
    with contextlib.suppress(OSError):
        staging.rmdir()
        return False
    try:
        with open(staging / _LOCK, "rb+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Held until nothing is left: a run that has made the file and not yet locked it finds it locked, or gone.
            return _remove(staging)
    except FileNotFoundError:
        return (staging / _CONTENT).exists() and _remove(staging)  # the lock goes last, before the folder itself
    except OSError:
        return False  # locked, somebody else's, or a file system without locks


def _remove(staging: Path) -> bool:
    """Remove a staging folder, its lock last; returns whether there was more in it than that."""
    had_content = (staging / _CONTENT).exists()
    shutil.rmtree(staging / _CONTENT, ignore_errors=True)
    shutil.rmtree(staging, ignore_errors=True)
    return had_content


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, locked until it is removed after the body."""
    while True:
        staging = out.with_name(_prefix(out) + secrets.token_hex(4))
        with unfinished(staging):
            staging.mkdir(mode=0o700)
            lock = _locked(staging / _LOCK)
            if lock is not None:
                with lock:
                    try:
                        yield staging
                    finally:
                        _remove(staging)
                return


def _locked(path: Path) -> BinaryIO | None:
    """A new lock, held; None if another run took the folder for litter before the lock was held."""
    with contextlib.suppress(FileNotFoundError):
        lock = open(path, "xb+")  # noqa: SIM115 - held as long as the folder is
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        except OSError:
            return lock  # a file system without locks: nobody can take anything for litter there
        if path.exists():
            return lock
        lock.close()
    return None


def _prefix(out: Path) -> str:
    return f".{os.fsdecode(os.fsencode(out.name)[:_LONGEST])}.partial-"


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns the new ones, deepest first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir(exist_ok=True)
    return missing


def _synchronise(folder: Path) -> None:
    """Wait until a folder and everything in it is on the disk."""
    for path, _, files in os.walk(folder):
        for name in files:
            _synchronise_one(Path(path) / name)
        _synchronise_one(Path(path))


def _synchronise_one(path: Path) -> None:
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _reason(problem: OSError | ValueError) -> str:
    return getattr(problem, "strerror", None) or str(problem)
