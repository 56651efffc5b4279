"""A folder appears whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from wisparse_jax.errors import PlanError
from wisparse_jax.files import check_new_folder, folders, new_folder

CODE = """
import sys, time
from wisparse_jax.errors import PlanError
from wisparse_jax.files import new_folder
with new_folder(sys.argv[1], PlanError) as folder:
    (folder / "a").write_text("mine")
    print("writing", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def start(out: Path, seconds: float) -> subprocess.Popen[str]:
    """Another process in the middle of writing `out`."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(out), str(seconds)], env=env, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.stdout.close()
    return process


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_with_the_permissions_of_any_other(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with new_folder(out, PlanError) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("text")
        assert not out.exists()
    (tmp_path / "other").mkdir()
    assert out.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert (out / "sub" / "a").read_text() == "text" and names(out.parent) == {"out"}


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(number: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        real_sync(number)

    def rename(self: Path, target: Path) -> Path:
        order.append("rename")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    with new_folder(tmp_path / "out", PlanError) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("text")
        (folder / "b").write_text("text")
    at = order.index("rename")
    assert set(order[:at]) == {"a", "b", "sub", "folder"} and order[at + 1 :] == [tmp_path.name]


@pytest.mark.parametrize("problem", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interruption_leaves_nothing(tmp_path: Path, problem: type[BaseException]) -> None:
    def write() -> None:
        with new_folder(tmp_path / "new" / "out", PlanError) as folder:
            (folder / "a").write_text("half")
            raise problem

    with pytest.raises(problem):
        write()
    assert names(tmp_path) == set()


EXISTS = "exists already; nothing is overwritten"
PLACES: dict[str, tuple[Any, str, str]] = {
    "folder": (lambda p: p.mkdir(), "", EXISTS),
    "file": (lambda p: p.write_text("mine"), "", EXISTS),
    "dangling link": (lambda p: p.symlink_to("nowhere"), "", EXISTS),
    "pipe": (os.mkfifo, "", EXISTS),
    "below a file": (lambda p: p.write_text("mine"), "x", "cannot be written: a folder above it is a file"),
    "below a dangling link": (lambda p: p.symlink_to("nowhere"), "x", "cannot be written: .*place is not a folder"),
    "below a loop": (lambda p: p.symlink_to(p), "x", "cannot be written: Too many levels of symbolic links"),
    "long name": (lambda p: p.mkdir(), "x" * 300, "cannot be written: File name too long"),
    "NUL": (lambda p: p.mkdir(), "a\0b", "cannot be written: (lstat: )?embedded null"),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_that_cannot_be_is_refused_before_the_work(tmp_path: Path, case: str) -> None:
    make, below, message = PLACES[case]
    make(tmp_path / "place")
    before = sorted(tmp_path.rglob("*"))
    for write in (check_new_folder, lambda *a: new_folder(*a).__enter__()):
        with pytest.raises(PlanError, match=message):
            write(tmp_path / "place" / below if below else tmp_path / "place", PlanError)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # the superuser may write anywhere
    with pytest.raises(PlanError, match=f"no permission to write to {tmp_path}, or it is read-only"):
        check_new_folder(tmp_path / "new" / "out", PlanError)


def test_a_folder_that_only_trying_shows_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a quota, a network share or /proc, where permissions say otherwise."""
    check_new_folder(tmp_path / "new", PlanError)
    assert not list(tmp_path.iterdir())

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PlanError, match=f"new: cannot be written: {os.strerror(errno.EDQUOT)}"):
        check_new_folder(tmp_path / "new", PlanError)


def test_names_as_long_as_names_may_be(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127):
        with new_folder(tmp_path / name, PlanError) as folder:
            (folder / "a").write_text("")
        assert names(tmp_path / name) == {"a"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_is_full(tmp_path: Path, number: int) -> None:
    def write() -> None:
        with new_folder(tmp_path / "out", PlanError) as folder:
            (folder / "a").write_text("half")
            raise OSError(number, os.strerror(number))

    with pytest.raises(PlanError, match=f"out: cannot be written: {os.strerror(number)}$"):
        write()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("empty", [True, False])
def test_what_came_meanwhile_stays(tmp_path: Path, empty: bool) -> None:
    def write() -> None:
        with new_folder(tmp_path / "out", PlanError):
            (tmp_path / "out").mkdir()
            if not empty:
                (tmp_path / "out" / "theirs").write_text("theirs")

    with pytest.raises(PlanError, match=EXISTS):
        write()
    assert names(tmp_path) == {"out"} and names(tmp_path / "out") == (set() if empty else {"theirs"})


def test_what_a_killed_run_left_is_named_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = start(tmp_path / "out [*]", 60)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (litter,) = names(tmp_path)
    assert litter.startswith(".out [*].partial-") and names(tmp_path / litter) == {"folder", "lock"}
    (tmp_path / ".out [*].partial-mine").write_text("a file of somebody else's")
    with new_folder(tmp_path / "other", PlanError):
        pass
    assert litter in names(tmp_path)  # it belongs to another place
    with new_folder(tmp_path / "out [*]", PlanError) as folder:
        (folder / "a").write_text("")
    assert names(tmp_path) == {"out [*]", "other", ".out [*].partial-mine"}
    assert capsys.readouterr().err == f"wisparse: removed {tmp_path / litter}, which a killed run had left\n"


def test_a_run_that_writes_is_not_litter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The other process finishes after this one, and is refused; neither takes the other's work."""
    process = start(tmp_path / "out", 1.0)
    with new_folder(tmp_path / "out", PlanError) as folder:
        (folder / "b").write_text("")
        assert len(names(tmp_path)) == 2
    assert names(tmp_path / "out") == {"b"} and capsys.readouterr().err == ""
    assert process.wait() == 1 and names(tmp_path) == {"out"} and names(tmp_path / "out") == {"b"}


def test_a_folder_without_its_lock_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was only about to lock its folder finds it gone, and makes another."""
    real, made = folders._locked, []

    def locked(path: Path) -> Any:
        if not made:
            folders.remove_litter(tmp_path / "out")
            assert not path.parent.exists()
        made.append(path)
        return real(path)

    monkeypatch.setattr(folders, "_locked", locked)
    with new_folder(tmp_path / "out", PlanError) as folder:
        (folder / "a").write_text("")
    assert len(made) == 2 and names(tmp_path) == {"out"}


def test_what_was_killed_while_it_was_being_removed_goes_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / ".out.partial-00000000.removed0"
    (half / "folder").mkdir(parents=True)
    folders.remove_litter(tmp_path / "out")
    assert names(tmp_path) == set() and f"removed {half}" in capsys.readouterr().err


def test_many_writers_of_one_place_and_one_is_whole(
    tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Threads have one process id, as processes in containers may have. They change at every chance."""
    errors: list[str] = []
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)

    def write(number: int) -> None:
        try:
            with new_folder(tmp_path / "out", PlanError) as folder:
                for i in range(4):
                    (folder / f"{i}").write_text(str(number))
        except PlanError as error:
            errors.append(str(error))

    for _ in range(50):
        threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert names(tmp_path) == {"out"} and len({p.read_text() for p in (tmp_path / "out").iterdir()}) == 1
        assert names(tmp_path / "out") == {str(i) for i in range(4)}
        assert len(errors) == 7 and all(re.search(EXISTS, error) for error in errors)
        errors.clear()
        folders.shutil.rmtree(tmp_path / "out")
    assert not capsys.readouterr().err  # nobody was killed
