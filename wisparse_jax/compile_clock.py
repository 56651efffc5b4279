"""How long JAX spends on compiling."""

from __future__ import annotations

import functools

import jax

_COMPILING = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")


class CompileClock:
    """Seconds spent on tracing, lowering, and compiling or reading what was compiled, since it was made.

    JAX has no way to take a listener back: see `compile_clock`.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith(_COMPILING):
            self.seconds += duration_secs


@functools.cache
def compile_clock() -> CompileClock:
    """The one of this process."""
    return CompileClock()
