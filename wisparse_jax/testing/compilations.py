"""What XLA compiles: how many programs, for tests that promise no recompilation, and with which roundings."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax


@dataclasses.dataclass
class Compilations:
    """How many programs were compiled inside the `with`."""

    count: int = 0


@contextlib.contextmanager
def count_compilations() -> Iterator[Compilations]:
    """Count the XLA compilations of this process while inside."""
    seen = Compilations()
    active = True

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if active and event == "/jax/core/compile/backend_compile_duration":
            seen.count += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        active = False  # listeners cannot be taken back one by one


def jit_as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` that rounds to a narrow dtype wherever the function does; XLA leaves out what it need not."""
    return jax.jit(function, compiler_options={"xla_allow_excess_precision": False})
