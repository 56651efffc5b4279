"""Compare the methods on one model: each calibrated on each text, each evaluated on each text, paired.

    python scripts/compare_methods.py demo --calibrate self books=calibration.txt \
        --evaluate books=other.txt wikitext=wiki.test.txt --out docs/benchmarks/demo-quality.md

Texts are `name=file`, or `self` for text that the dense model samples. The report is Markdown; the figures are also
written beside it as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from tyro.conf import Positional

from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation import Evaluation, evaluate, text_windows
from wisparse_jax.inference import sample_windows
from wisparse_jax.models.llama import Llama
from wisparse_jax.models.loading import load, load_tokenizer, model_fingerprint
from wisparse_jax.models.tokenizer import Tokenizer
from wisparse_jax.search import SearchSettings, read_settings, run_dense, search_plan
from wisparse_jax.sparsity import SparsityPlan, apply

# name -> (method, settings that differ)
VARIANTS: dict[str, tuple[str, dict[str, bool]]] = {
    "uniform": ("uniform", {}),
    "wina": ("wina", {}),
    "teal": ("teal", {}),
    "wisparse": ("wisparse", {}),
}
ABLATIONS: dict[str, tuple[str, dict[str, bool]]] = {
    "exponents only": ("wisparse", {"search_blocks": False, "search_layers": False}),
    "blocks only": ("wisparse", {"search_exponents": False, "search_layers": False}),
    "without exponents": ("wisparse", {"search_exponents": False}),
    "without blocks": ("wisparse", {"search_blocks": False}),
    "without layers": ("wisparse", {"search_layers": False}),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare the methods on one model."""

    model: Positional[str]
    calibrate: tuple[str, ...] = ("self",)
    evaluate: tuple[str, ...] = ("self",)
    out: Path = Path("comparison.md")
    sparsity: float = 0.5
    tokens: int = 32_768  # evaluation text, tokens of whole windows; half of them are scored
    config: Path | None = None
    seed: int = 0
    ablations: Annotated[bool, tyro.conf.arg(help="Also run WiSparse with stages switched off.")] = False


def main() -> None:
    """Run the comparison and write the report."""
    args = tyro.cli(Arguments, description=__doc__)
    if args.out.exists():
        sys.exit(f"compare_methods: {args.out} exists already")
    try:
        settings = read_settings(args.config)
        model, tokenizer = load(args.model, "float32"), load_tokenizer(args.model)
        sections = []
        held_out = {
            split_name(spec)[0]: read_text(spec, model, tokenizer, settings.window, args.tokens, args.seed + 1000)
            for spec in args.evaluate
        }
        for spec in args.calibrate:
            windows = read_text(spec, model, tokenizer, settings.window, settings.tokens, args.seed)
            sections.append(compare(args, model, split_name(spec)[0], windows, held_out, settings))
    except WisparseError as error:
        sys.exit(f"compare_methods: {error}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(header(args, settings) + "\n".join(text for text, _ in sections), encoding="utf-8")
    figures = {name: data for _, data in sections for name, data in data.items()}
    args.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(args.out.read_text(encoding="utf-8"))


def split_name(spec: str) -> tuple[str, str]:
    """`name=file` taken apart; `self` is its own name."""
    name, _, file = spec.partition("=")
    if not file and name != "self":
        sys.exit(f"compare_methods: {spec!r}: expected name=file or self")
    return name, file


def read_text(spec: str, model: Llama, tokenizer: Tokenizer, window: int, tokens: int, seed: int) -> np.ndarray:
    """The windows of a text, or as many that the model samples."""
    name, file = split_name(spec)
    if name == "self":
        return sample_windows(model, -(-tokens // window), window, seed=seed)
    return text_windows(tokenizer, file, window, tokens)


def compare(
    args: Arguments,
    model: Llama,
    source: str,
    windows: np.ndarray,
    held_out: dict[str, np.ndarray],
    settings: SearchSettings,
) -> tuple[str, dict[str, dict]]:
    """Plans of all variants calibrated on one text, evaluated on all: a Markdown section and the figures."""
    started = time.perf_counter()
    calibration = run_dense(model.config, model.params, windows, settings, args.seed)
    jax.block_until_ready(calibration.hidden)
    seconds = time.perf_counter() - started
    record = {"text": source, "tokens": int(windows.size), "window": settings.window}
    plans: dict[str, SparsityPlan] = {}
    for name, (method, changes) in (VARIANTS | (ABLATIONS if args.ablations else {})).items():
        print(f"{source}: {name}", file=sys.stderr, flush=True)
        chosen = dataclasses.replace(settings, **changes)
        plans[name] = search_plan(
            calibration, model_fingerprint(model), args.sparsity, method, args.seed, chosen, False, record, seconds
        )
    sparse = {name: apply(model, plan) for name, plan in plans.items()}
    text, figures = [f"## Calibrated on {source}, {windows.size} tokens\n"], {}
    for name, ids in held_out.items():
        result = evaluate(model, ids, sparse)
        text.append(section(name, result))
        figures[f"{source} -> {name}"] = {variant: result.as_json(variant) for variant in sparse} | {
            "wisparse minus": {v: dataclasses.asdict(result.paired("wisparse", v)) for v in sparse if v != "wisparse"}
        }
    figures[f"{source} plans"] = {
        name: {"timings": p.timings, "block_budgets": p.history.get("block budgets")} for name, p in plans.items()
    }
    text.append("Seconds per stage (the first run of a stage includes its compilation):\n")
    for name, plan in plans.items():
        text.append(f"- {name}: " + ", ".join(f"{stage} {took:.1f}" for stage, took in plan.timings.items()))
    return "\n".join(text) + "\n", figures


def section(name: str, result: Evaluation) -> str:
    """One evaluation text as a Markdown table."""
    dense = result.dense.perplexity
    rows = [
        f"Evaluated on {name}, {result.tokens} scored tokens; dense perplexity {dense.mean:.3f} ± {dense.error:.3f}\n",
        "| method | perplexity | KL, nats/token | KL of wisparse minus this, paired | realised sparsity |",
        "|---|---|---|---|---|",
    ]
    for variant, score in result.sparse.items():
        gap = result.paired("wisparse", variant)
        paired = "" if variant == "wisparse" else f"{gap.mean:+.4f} ± {gap.error:.4f}"
        rows.append(
            f"| {variant} | {score.perplexity.mean:.3f} ± {score.perplexity.error:.3f} "
            f"| {score.divergence.mean:.4f} ± {score.divergence.error:.4f} | {paired} "
            f"| {score.sparsity.mean:.4f} ± {score.sparsity.error:.4f} |"
        )
    return "\n".join(rows) + "\n"


def header(args: Arguments, settings: SearchSettings) -> str:
    """What was run, where."""
    command = " ".join(["python", "scripts/compare_methods.py", *sys.argv[1:]])
    device = jax.devices()[0]
    return (
        f"# Methods compared on {args.model} at {args.sparsity:.0%} sparsity\n\n"
        f"Command: `{command}`  \nDate: {time.strftime('%Y-%m-%d')}; device: {device.device_kind}; "
        f"jax {jax.__version__}; float32; seed {args.seed}  \n"
        f"Search: {json.dumps(dataclasses.asdict(settings))}  \n"
        "The second half of every window runs sparse and is scored. ± is one standard error over windows.\n\n"
    )


if __name__ == "__main__":
    main()
