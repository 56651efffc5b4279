"""The `wisparse` command: arguments in, the library's functions called, one line for an error.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, subcommand

from wisparse_jax.errors import WisparseError


@dataclasses.dataclass(frozen=True)
class Demo:
    """Make the packaged model 50 % sparse by every method, compare them, and let it write."""

    out: Path | None = None
    """Folder for the plans and figures; by default a new one under runs/."""

    def run(self) -> None:
        """Run the demo."""
        from wisparse_jax.report.demo import run_demo

        run_demo(self.out)


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """Search a sparsity plan for a model."""

    model: Positional[str]
    """A folder, a hub id, or `demo`."""
    out: Path
    """Folder to write the plan to; it must not exist."""
    sparsity: float = 0.5
    """Share of the channels to skip, averaged over all block linears weighted by parameter count."""
    method: str = "wisparse"
    """wisparse, teal, wina or uniform."""
    text: str = "self"
    """Calibration text: a UTF-8 file, or `self` for text that the dense model samples."""
    tokens: int | None = None
    """Tokens of calibration text; by default those of the configuration."""
    seed: int = 0
    """Seed of the sampled text, the statistics and the searches."""
    config: Path | None = None
    """YAML file with the search's settings, such as configs/quick.yaml."""

    def run(self) -> None:
        """Search and save the plan."""
        from wisparse_jax.evaluation import text_windows
        from wisparse_jax.inference import sample_windows
        from wisparse_jax.models.loading import load, load_tokenizer
        from wisparse_jax.search import calibrate, read_settings
        from wisparse_jax.search.pipeline import check_sparsity
        from wisparse_jax.sparsity.methods import get_method

        # Everything that can be refused is refused before any work is done.
        settings = read_settings(self.config)
        check_sparsity(self.sparsity, settings)
        get_method(self.method)
        if self.out.exists():
            raise WisparseError(f"{self.out}: exists already; a plan is never overwritten")
        if self.tokens is not None and self.tokens < 1:
            raise WisparseError(f"tokens = {self.tokens}: expected 1 or above")
        tokens = settings.tokens if self.tokens is None else self.tokens
        model = load(self.model)
        window = min(settings.window, model.config.context)
        if self.text == "self":
            windows = sample_windows(model, -(-tokens // window), window, seed=self.seed, progress=True)
        else:
            windows = text_windows(load_tokenizer(self.model), self.text, window, tokens)
        source = self.text if self.text == "self" else Path(self.text).name
        plan = calibrate(model, windows, self.sparsity, self.method, self.seed, settings, progress=True, text=source)
        plan.save(self.out)
        print(f"{self.method} plan at {plan.mean_sparsity:.4f} sparsity: {self.out}")


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure perplexity, KL(dense || sparse) and realised sparsity on a text."""

    model: Positional[str]
    """A folder, a hub id, or `demo`."""
    text: str
    """A UTF-8 file, or `self` for text that the dense model samples."""
    plan: Path | None = None
    """The plan; without one only the dense model is measured."""
    tokens: int | None = None
    """Tokens of text to read, rounded up to whole windows; by default all of a file, 16,384 of `self`."""
    sparse_prefill: float = 0.5
    """Share of each window, at its end, that runs sparse and is scored."""
    window: int | None = None
    """Tokens in a window; by default the model's context, at most 2,048."""
    seed: int = 1
    """Seed of self-sampled text."""
    weights: str | None = None
    """int8 measures the model with int8 block weights against the model as it is, dense and with the plan."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def run(self) -> None:
        """Evaluate and print."""
        from wisparse_jax.evaluation import evaluate, text_windows
        from wisparse_jax.inference import sample_windows
        from wisparse_jax.models.llama import Llama
        from wisparse_jax.models.loading import load, load_tokenizer
        from wisparse_jax.sparsity import SparseLlama, SparsityPlan, apply

        plan = None if self.plan is None else SparsityPlan.load(self.plan)
        model = load(self.model)
        measured = model if self.weights is None else load(self.model, weights=self.weights)
        sparse = None if plan is None else apply(measured, plan)
        window = min(model.config.context, 2048) if self.window is None else self.window
        if self.text == "self":
            count = -(-(self.tokens or 16_384) // window) if window > 0 else 0
            windows = sample_windows(model, count, window, seed=self.seed, progress=True)
        else:
            windows = text_windows(load_tokenizer(self.model), self.text, window, self.tokens)
        plans: dict[str, Llama | SparseLlama] = {}
        if self.weights is not None:
            plans[f"dense {self.weights}"] = measured
        if plan is not None and sparse is not None:
            plans[plan.method] = sparse
        result = evaluate(model, windows, plans, self.sparse_prefill, progress=True)
        if self.json:
            settings = {"model": self.model, "text": self.text, "plan": None if self.plan is None else str(self.plan)}
            settings |= {"weights": self.weights}
            stated = {} if plan is None else {"method": plan.method, "target": plan.target}
            print(json.dumps(result.as_json(next(reversed(plans), None)) | settings | stated, allow_nan=False))
            return
        from wisparse_jax.report.tables import console, layer_table, quality_table

        show = console()
        share = f"the last {self.sparse_prefill:.0%} of each window sparse"
        show.print(quality_table(result, f"{result.tokens} tokens of {self.text}, {share}"))
        if plan is not None:
            show.print(layer_table(result.sparse[plan.method]))


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
    """int8 runs the block weights in int8."""
    implementation: str | None = None
    """The decode step of a sparse model: triton, mosaic, xla, or by default the faster one of those that can run."""

    def run(self) -> None:
        """Generate and print."""
        from wisparse_jax.inference import Sample, TextStream, decode_implementation, generate
        from wisparse_jax.models.loading import load, load_tokenizer
        from wisparse_jax.sparsity import SparsityPlan, apply

        sampler = Sample(self.temperature, self.top_k, self.top_p)
        plan = None if self.plan is None else SparsityPlan.load(self.plan)
        model, tokenizer = load(self.model, weights=self.weights), load_tokenizer(self.model)
        writer = model if plan is None else apply(model, plan)
        thresholds = getattr(writer, "thresholds", None)
        chosen = decode_implementation(writer.config, writer.params, thresholds, 1, self.implementation)
        if plan is not None:
            print(f"{plan.method} plan, sparsity {plan.target:g}, decoding by {chosen}", file=sys.stderr)
        stream, shown = TextStream(tokenizer.decode), [self.prompt]

        def show(new: list[list[int]]) -> None:
            # The prompt goes out with the first tokens: a refused request prints nothing.
            print("".join([*shown, stream.add(new[0])]), end="", flush=True)
            shown.clear()

        generate(writer, [tokenizer.encode(self.prompt)], self.max_new_tokens, sampler, self.seed, show, chosen)
        print("".join([*shown, stream.rest()]))


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a model as an Orbax checkpoint that every command accepts."""

    model: Positional[str]
    """A folder, a hub id, or `demo`."""
    out: Positional[Path]
    """Folder to write; it must not exist."""

    def run(self) -> None:
        """Convert."""
        from wisparse_jax.models.checkpoint import convert

        convert(self.model, self.out)
        print(self.out)


Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Calibrate, subcommand("calibrate")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Generate, subcommand("generate")]
    | Annotated[Convert, subcommand("convert")]
)


def main(args: list[str] | None = None) -> None:
    """Run a command line; exits with 2 and one line on bad input, 130 when interrupted."""
    # transformers advises to install PyTorch, which nothing here uses.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # XLA would choose a GPU's products by timing them: the same seed would round differently from run to run.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    command = tyro.cli(Command, args=args, prog="wisparse", description="Sparse Llama-family models without training.")
    try:
        command.run()
    except WisparseError as error:
        print(f"wisparse: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("wisparse: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
