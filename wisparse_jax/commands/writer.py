"""What `generate` and `chat` share: their options, and a model that answers as they say."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from wisparse_jax.commands.devices import OnDevices
from wisparse_jax.commands.options import Unset

if TYPE_CHECKING:
    from wisparse_jax.inference.text import Answer
    from wisparse_jax.inference.timing import Timing
    from wisparse_jax.models.model import Model

# A text, or a conversation: messages with a "role" and a "content".
Prompt = str | list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing:
    """Options of whatever writes text."""

    plan: Unset[str | None] = None
    """The plan, a folder or a hub id; without one the model is dense, unless it was converted with one."""
    bits: Unset[float | None] = None
    """Of a plan for planes: the bits to read of a weight, scales counted, in place of those that it was made at."""
    max_new_tokens: int = 128
    """At most so many new tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: Unset[int | None] = None
    """Sample from the k most likely tokens only."""
    top_p: float = 1.0
    """Sample from the most likely tokens that hold this share of the probability."""
    min_p: float = 0.0
    """Sample from tokens at least this share as likely as the most likely one only."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that the text already holds less likely, also where the choice is greedy."""
    seed: int = 0
    """Same seed, same text."""
    weights: Unset[str | None] = None
    """The format to run the block weights in, such as int8."""
    head: Unset[str | None] = None
    """int8 runs the head in that."""
    implementation: Unset[str | None] = None
    """The decode step of a sparse model: triton, mosaic, xla, or by default the faster one of those that can run."""
    fixed_thresholds: Unset[bool] = False
    """Take the plan's thresholds as they are. By default they follow the text, so that what is skipped is the plan's
    sparsity."""


class Writer:
    """A model that answers as the options say: its configuration and tokenizer at once, its weights by `load`.

    The weights are being read from the start: importing the tokenizer's library takes as long as gigabytes of them
    where PyTorch is installed, which it brings along. What is refused meanwhile does not wait for them.

    Raises:
        WisparseError: what can be refused without the weights.
    """

    def __init__(self, options: Writing, name: str):
        from wisparse_jax.arguments import check_seed
        from wisparse_jax.commands.plans import at_bits, plan_of
        from wisparse_jax.compile_clock import compile_clock
        from wisparse_jax.inference import Sample, decode_implementation
        from wisparse_jax.models.hub import resolve
        from wisparse_jax.models.loading import check_kinds, load_tokenizer, read_model_config
        from wisparse_jax.models.mesh import make_mesh

        self.options, self.name, self.clock = options, name, compile_clock()
        cuts = (options.top_k, options.top_p, options.min_p)
        self.sampler = Sample(options.temperature, *cuts, options.repetition_penalty)
        check_seed(options.seed)
        check_kinds(weights=options.weights, head=options.head)
        self.plan = at_bits(plan_of(name, options.plan), options.bits)
        self.config = read_model_config(resolve(name, ("config",)))
        asked = options.devices.mesh if isinstance(options, OnDevices) else None
        self.mesh = None if asked is None else make_mesh(asked, self.config, options.weights)
        if self.plan is None or (self.mesh is not None and options.implementation == "mosaic"):
            decode_implementation(self.config, None, None, 1, options.implementation, self.mesh)
        self._began = time.perf_counter()
        reader = ThreadPoolExecutor(1, "load")
        self._reading = reader.submit(self._read)
        reader.shutdown(wait=False)
        self.tokenizer = load_tokenizer(name)

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return self.tokenizer.inner.chat_template is not None

    def check(self, prompt: Prompt, raw: bool, system: str | None) -> None:
        """Refuse a prompt that the model cannot answer."""
        from wisparse_jax.inference import encode_prompt
        from wisparse_jax.inference.generate import check_request

        check_request(self.config, [encode_prompt(self.tokenizer, prompt, raw, system)], self.options.max_new_tokens)

    def load(self) -> None:
        """Wait for the weights; what was chosen is said on standard error."""
        from kernels_pallas.implementation import mosaic_problem
        from wisparse_jax.inference import decode_implementation
        from wisparse_jax.models.widen import widened_where_faster

        self.model, line = widened_where_faster(self._reading.result())
        self.load_seconds = time.perf_counter() - self._began
        model, asked = self.model, self.options.implementation
        self.implementation = decode_implementation(model.config, model.params, model.rules, 1, asked)
        if line is not None:
            print(line, file=sys.stderr)
        if self.plan is not None:
            rate = f"sparsity {self.plan.target:g}" if self.plan.bits is None else f"{self.plan.bits:.4g} bits a weight"
            how = f"{rate}, decoding by {self.implementation}"
            if self.mesh is not None:
                how += f" on {', '.join(f'{axis}={size}' for axis, size in self.mesh.shape.items())}"
                how += " (mosaic runs on one device only)" if mosaic_problem() is None else ""
            print(f"{self.plan.method} plan, {how}", file=sys.stderr)

    def _read(self) -> Model:
        from wisparse_jax.sparsity import load

        weights, head = self.options.weights, self.options.head
        return load(self.name, None, weights, head, plan=self.plan, mesh=self.mesh)

    def answer(self, prompt: Prompt, stop: Sequence[str] = (), raw: bool = False, system: str | None = None) -> Answer:
        """The answer to a text or a conversation, not yet begun."""
        from wisparse_jax.inference import stream

        options = (self.options.max_new_tokens, self.sampler, self.options.seed, stop, raw, system, self.implementation)
        return stream(self.model, self.tokenizer, prompt, *options, hold=not self.options.fixed_thresholds)

    def write(self, answer: Answer, show: Callable[[str], object]) -> Timing:
        """Show an answer as it comes, and time it."""
        from wisparse_jax.inference.timing import timed

        return timed(answer, self.clock, show)


def cut_off(answer: Answer) -> str:
    """What to add to the line about an answer that would have gone on; tokens of the text that ended it count."""
    return {"length": "; ended by --max-new-tokens", "stop": "; ended by --stop"}.get(answer.stop_reason or "", "")
