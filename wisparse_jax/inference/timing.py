"""How long a generation took: what JAX spent on compiling, until the first token, and between tokens."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from wisparse_jax.compile_clock import CompileClock
from wisparse_jax.inference.text import Answer


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one answer; `compile` is in none of the others. `rate` is of the tokens after the first."""

    compile: float
    first_token: float
    total: float
    tokens: int
    rate: float | None
    sparsity: float | None = None  # the share of the weights that was skipped, of a sparse model

    def __str__(self) -> str:
        parts = [f"compile {self.compile:.1f} s", f"first token {self.first_token:.2f} s", f"{self.tokens} tokens"]
        parts += [] if self.rate is None else [f"{self.rate:.1f} tok/s"]
        return ", ".join(parts + ([] if self.sparsity is None else [f"{self.sparsity:.1%} skipped"]))


def timed(answer: Answer, clock: CompileClock, show: Callable[[str], object]) -> Timing:
    """Hand every piece of an answer to `show`, and time it."""

    def now() -> tuple[float, float]:
        return time.perf_counter(), clock.seconds

    began, compiled = now()
    show(next(answer))  # there is one, if an empty one
    first, compiled_first = end, compiled_end = now()
    for piece in answer:
        end, compiled_end = now()
        show(piece)
    to_first = max(first - began - (compiled_first - compiled), 0.0)
    after = max(end - first - (compiled_end - compiled_first), 0.0)
    count = len(answer.tokens)
    rate = (count - 1) / after if count > 1 and after > 0 else None
    return Timing(compiled_end - compiled, to_first, to_first + after, count, rate, answer.sparsity)
