"""What `generate` and `chat` share: their options, and a loaded model that answers and is timed."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wisparse_jax.inference.text import Answer
    from wisparse_jax.inference.timing import Timing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing:
    """Options of whatever writes text."""

    plan: Path | None = None
    """The plan; without one the model is dense."""
    max_new_tokens: int = 128
    """At most so many new tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int | None = None
    """Sample from the k most likely tokens only."""
    top_p: float = 1.0
    """Sample from the most likely tokens that hold this share of the probability."""
    seed: int = 0
    """Same seed, same text."""
    weights: str | None = None
    """int8 runs the block weights in int8."""
    implementation: str | None = None
    """The decode step of a sparse model: triton, mosaic, xla, or by default the faster one of those that can run."""

    def load(self, name: str) -> Writer:
        """The model and its tokenizer; what was chosen is said on standard error."""
        from wisparse_jax.inference import Sample, decode_implementation
        from wisparse_jax.inference.timing import CompileClock
        from wisparse_jax.models.loading import load, load_tokenizer
        from wisparse_jax.sparsity import SparsityPlan, apply

        sampler = Sample(self.temperature, self.top_k, self.top_p)
        clock, began = CompileClock(), time.perf_counter()
        plan = None if self.plan is None else SparsityPlan.load(self.plan)
        # Importing transformers takes as long as reading a small model.
        with ThreadPoolExecutor(1) as beside:
            reading = beside.submit(load_tokenizer, name)
            model = load(name, weights=self.weights)
            tokenizer = reading.result()
        model = model if plan is None else apply(model, plan)
        thresholds = getattr(model, "thresholds", None)
        chosen = decode_implementation(model.config, model.params, thresholds, 1, self.implementation)
        if plan is not None:
            print(f"{plan.method} plan, sparsity {plan.target:g}, decoding by {chosen}", file=sys.stderr)
        return Writer(self, model, tokenizer, sampler, chosen, clock, time.perf_counter() - began)


@dataclasses.dataclass(frozen=True)
class Writer:
    """A loaded model with the options that it writes by."""

    options: Writing
    model: Any
    tokenizer: Any
    sampler: Any
    implementation: str
    clock: Any
    load_seconds: float

    def continues(self, raw: bool = False) -> bool:
        """Whether a text is continued, not answered."""
        return raw or self.tokenizer.inner.chat_template is None

    def answer(
        self,
        prompt: Any,
        stop: Sequence[str] = (),
        raw: bool = False,
        system: str | None = None,
    ) -> Answer:
        """The answer to a text or a conversation, not yet begun."""
        from wisparse_jax.inference import stream

        options = self.options
        return stream(
            self.model,
            self.tokenizer,
            prompt,
            options.max_new_tokens,
            self.sampler,
            options.seed,
            stop,
            raw,
            system,
            self.implementation,
        )

    def timed(self, answer: Answer, show: Callable[[str], object]) -> Timing:
        """Show an answer as it comes, and time it."""
        from wisparse_jax.inference.timing import timed

        return timed(answer, self.clock, show)

    def times(self, timing: Timing) -> str:
        """A line for people."""
        return f"load {self.load_seconds:.1f} s, {timing}"
