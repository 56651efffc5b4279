"""`wisparse generate`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from tyro.conf import Positional


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt, streaming to the terminal."""

    model: Positional[str]
    """A folder, a hub id, or `demo`."""
    prompt: str
    """The text to continue."""
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
    """int8 or int4 runs the block weights in that."""
    head: str | None = None
    """int8 runs the head in that."""
    implementation: str | None = None
    """The decode step of a sparse model: triton, mosaic, xla, or by default the faster one of those that can run."""

    def run(self) -> None:
        """Generate and print."""
        from wisparse_jax.inference import Sample, TextStream, decode_implementation, generate
        from wisparse_jax.models.loading import load, load_tokenizer
        from wisparse_jax.sparsity import SparsityPlan, load_sparse

        sampler = Sample(self.temperature, self.top_k, self.top_p)
        plan = None if self.plan is None else SparsityPlan.load(self.plan)
        tokenizer = load_tokenizer(self.model)
        if plan is None:
            writer, rules = load(self.model, weights=self.weights, head=self.head), None
        else:
            writer = load_sparse(self.model, plan, weights=self.weights, head=self.head)
            rules = writer.rules
        chosen = decode_implementation(writer.config, writer.params, rules, 1, self.implementation)
        if plan is not None:
            print(f"{plan.method} plan, sparsity {plan.target:g}, decoding by {chosen}", file=sys.stderr)
        prompt, shown = tokenizer.encode(self.prompt), [self.prompt]
        stream = TextStream(tokenizer.decode, prompt, tokenizer.open_byte)

        def show(new: list[list[int]]) -> None:
            # The prompt goes out with the first tokens: a refused request prints nothing.
            print("".join([*shown, stream.add(new[0])]), end="", flush=True)
            shown.clear()

        generate(writer, [prompt], self.max_new_tokens, sampler, self.seed, show, chosen)
        print("".join([*shown, stream.rest()]))
