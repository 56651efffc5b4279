"""How a command ends when it is told to: at once, with one line, and with nothing unfinished left behind.

An exception raised by a signal handler can be swallowed (by a callback of the garbage collector), shown as a traceback
(from an import), or come minutes late (after a long call into XLA). So a thread of its own waits for the signals,
removes what is unfinished and ends the process. Only the `wisparse` command starts it: in a program that uses the
library, Ctrl-C is the KeyboardInterrupt that it always is, and what is unfinished is removed as the exception passes.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "ended, as its terminal was closed"}

# Where a file or folder is written before it gets its name; the process removes these wherever it is stopped.
_unfinished: set[str] = set()
# Where what was found is kept for the next run of the same command; a name alone, for a thread to read at any moment.
_kept: str | None = None
# Whoever holds it decides how the process goes on: the thread that ends it never lets go.
_decision = threading.RLock()


@contextlib.contextmanager
def unfinished(path: str | os.PathLike[str]) -> Iterator[None]:
    """While the body runs, `path` is a file or folder under way, to be removed unless the body renames it away.

    Enter before `path` is created, so that no moment is left out. It is removed when the body ends, however it ends,
    and when a signal ends the command; after an error once more at exit, for threads that wrote on.
    """
    name = os.path.abspath(path)
    _unfinished.add(name)
    try:
        yield
    except BaseException:
        _remove(name)
        raise
    else:
        _remove(name)
        _unfinished.discard(name)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """No signal ends the command while the body runs; for the rename that publishes, and nothing long."""
    with _decision:
        yield


def goes_on_from(folder: str | os.PathLike[str] | None) -> None:
    """From now on a command that ends before its time says that it goes on from a folder; with None, no longer."""
    global _kept
    _kept = None if folder is None else os.fspath(folder)


def last_words(words: str) -> str:
    """A last line and, where something is kept, how to go on."""
    kept = _kept
    return words if kept is None else f"{words}; the same command goes on from what is kept in {kept}"


def watch() -> None:
    """From now on SIGINT, SIGTERM and SIGHUP end this process, with 128 + their number, whatever it is doing.

    A signal that the process was started to ignore (as nohup does) stays ignored.
    """
    for descriptor in (0, 1, 2):
        # Where the shell has closed one, the next file to be opened would get its number, and what is printed.
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            continue
        os.open(os.devnull, os.O_RDWR)
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    # The interpreter's own handler writes the number of a signal there, even while Python runs no code.
    signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    threading.Thread(target=_wait, args=(receiving,), name="signals", daemon=True).start()
    for number in WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def leave(code: int, line: str | None = None) -> NoReturn:
    """End the process now, with a last line on standard error; what was printed before it is written out.

    Skips the interpreter's own end, in which a signal would show a traceback.
    """
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
    _decision.acquire()
    _last_line(line)
    os._exit(code)


def _wait(receiving: int) -> None:
    number = 0
    while number not in WORDS:  # a library may handle others, whose numbers come here too
        number = os.read(receiving, 1)[0]
    _decision.acquire()
    # Threads whose files vanish would complain at length until the process is gone.
    errors = 2
    with contextlib.suppress(OSError):  # standard error may be closed
        errors = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _remove_all()
    _last_line(last_words(f"wisparse: {WORDS[signal.Signals(number)]}"), errors)
    os._exit(128 + number)


def _last_line(line: str | None, errors: int = 2) -> None:
    # By the file descriptor: another thread may hold the lock of sys.stderr.
    with contextlib.suppress(OSError):
        if _bar_shown():
            os.write(errors, b"\r\x1b[K" if os.isatty(errors) else b"\n")
        if line is not None:
            os.write(errors, (line + "\n").encode("utf-8", "backslashreplace"))


def _bar_shown() -> bool:
    """Whether a progress bar stands on the current line of standard error."""
    tqdm: Any = sys.modules.get("tqdm")
    bars = getattr(getattr(tqdm, "tqdm", None), "_instances", ())
    return any(not bar.disable for bar in list(bars))


def _remove(name: str) -> None:
    with _decision:  # one thread at a time: while it lasts the process does not end
        _remove_now(name)


def _remove_now(name: str) -> None:
    import shutil
    import time

    aside: set[str] = set()
    clean = 0
    for attempt in range(50):  # a thread that writes on may put something new there, or in what was moved aside
        time.sleep(0.01 * (attempt > 0))
        if os.path.lexists(name):
            # Under another name it grows no more while it is being removed.
            other = f"{name}.removed{attempt}"
            try:
                os.rename(name, other)
            except OSError:
                other = name
            aside.add(other)
        aside = {path for path in aside if os.path.lexists(path)}
        clean = 0 if aside else clean + 1
        if clean == 3 or (attempt == 0 and not aside):
            return
        for path in aside:
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(path)


@atexit.register
def _remove_all() -> None:
    for name in list(_unfinished):
        _remove(name)
