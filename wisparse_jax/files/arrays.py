"""Writing arrays with Orbax, and keeping its threads quiet after the first of them has failed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from wisparse_jax.errors import WisparseError, first_line

T = TypeVar("T")


def outside_event_loops(function: Callable[[], T]) -> T:
    """Call a function where no event loop runs, as one does in a notebook: within one Orbax needs uvloop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return function()
    with ThreadPoolExecutor(1, "arrays") as threads:
        return threads.submit(function).result()


def _of_other_tasks(record: logging.LogRecord) -> bool:
    """Whether asyncio speaks of anything but a write that failed after the first failed write had been raised."""
    text = record.getMessage()
    return "exception was never retrieved" not in text or not ("orbax" in text or "tensorstore" in text)


@contextlib.contextmanager
def first_failure_alone() -> Iterator[None]:
    """Show the first failure of Orbax's threads alone: they go on after it, and fail again."""
    log, shown = logging.getLogger("absl"), sys.unraisablehook
    log.disabled = True

    def without_late_tasks(unraisable: Any) -> None:
        # A task that ends after the call that it was of has failed, and closed its event loop.
        if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
            shown(unraisable)

    sys.unraisablehook = without_late_tasks
    tasks = logging.getLogger("asyncio")
    tasks.addFilter(_of_other_tasks)
    try:
        yield
        # After a failure both stay: other tasks are still under way.
        sys.unraisablehook = shown
        tasks.removeFilter(_of_other_tasks)
    finally:
        log.disabled = False


def write_arrays(folder: Path, arrays: Mapping[str, Any], overwrite: bool = False, named: str | Path = "") -> None:
    """Write arrays by name into a folder, which appears whole.

    Args:
        folder: Orbax's own; it must not exist, unless `overwrite`.
        arrays: of JAX or NumPy.
        overwrite: whether a folder that is there is replaced.
        named: what the error calls the place, if not `folder`.

    Raises:
        WisparseError: the arrays cannot be written, as on a full disk.
    """
    import orbax.checkpoint as ocp

    def write() -> None:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
            writer.save(folder.absolute(), args=ocp.args.PyTreeSave(dict(arrays)), force=overwrite)

    try:
        # What its threads complain of when the folder is taken from them, or the disk is full, is raised as well.
        with first_failure_alone():
            outside_event_loops(write)
    except Exception as error:  # Orbax and TensorStore raise many kinds when the disk is full
        raise WisparseError(f"{named or folder}: cannot be written by Orbax: {first_line(error)}") from None
