"""Quality of every kind of weights at every sparsity, beside the bytes that a token reads.

    python scripts/quality_table.py MODEL --out runs/quality --calibrate wikitext=wiki.txt@:300000 \
        --evaluate wikitext=wiki.txt@300000: --plans runs/plans

Texts are as in compare_methods.py. `--plans` is a folder with one plan for each sparsity, such as `wisparse calibrate
MODEL --out runs/plans/plan --sparsity 0.3 0.4 0.5 0.6` writes; without, plans are searched on the calibration text and
saved. A plan's basis is folded in before anything is rounded. int4 is rounded to the nearest and so that it makes up
for its errors on the calibration text; dense rows are of the model in its own basis and in the plans'.

Into the folder go quality.csv, a row for each kind of weights and sparsity, written as they come, and quality.md.
`scripts/plot_quality.py` draws them. Tokens a second are not measured here: they are the ones of Llama-3.1-8B shapes in
`--speeds`, where that has the row.
"""

from __future__ import annotations

import csv
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import tyro
from comparison_texts import read_windows
from tyro.conf import Positional

import wisparse_jax as ws
from wisparse_jax.benchmark.cost import step_bytes
from wisparse_jax.models.config import LlamaConfig, read_config
from wisparse_jax.models.llama import Llama
from wisparse_jax.models.parameters import param_shapes
from wisparse_jax.models.quantise import quantise, quantise_params
from wisparse_jax.presets import shapes
from wisparse_jax.sparsity import SparseLlama, SparsityPlan, apply

HOME = Path(__file__).resolve().parent.parent
# What the rows are called, and the kind of weights and whether it is rounded by the text.
KINDS = {
    "bfloat16": (None, False), "int8": ("int8", False), "int4": ("int4", False), "int4, compensated": ("int4", True),
}  # fmt: skip
LARGE = "llama-3.1-8b"
COLUMNS: tuple[str, ...] = (
    "weights", "basis", "target", "sparsity", "perplexity", "perplexity_error", "kl", "kl_error", "megabytes",
    "gigabytes_8b", "tokens_per_second_8b",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure quality by kind of weights and sparsity."""

    model: Positional[str]
    out: Path  # a new folder
    calibrate: str = "self"
    evaluate: str = "self"
    plans: Path | None = None  # a folder of plans
    sparsities: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6)  # of the plans that are searched
    config: str | None = None  # of the search
    kinds: tuple[str, ...] = tuple(KINDS)
    head: str | None = None  # "int8" rounds the head of every rounded row
    tokens: int = 32_768  # of each text; half of the evaluation's are scored
    window: int = 512
    dtype: str = "float32"  # of activations, and of weights that are not rounded
    context: int = 512  # whose keys and values a token reads
    speeds: Path = HOME / "docs" / "benchmarks" / "decode-h100.csv"


def main() -> None:
    """Measure, row by row."""
    args = tyro.cli(Arguments, description=__doc__)
    if unknown := set(args.kinds) - set(KINDS):
        sys.exit(f"quality_table: kinds: expected some of {', '.join(KINDS)}, found {', '.join(sorted(unknown))}")
    args.out.mkdir(parents=True)
    model, tokenizer = ws.load(args.model, dtype=args.dtype), ws.load_tokenizer(args.model)
    specs = (args.calibrate, args.evaluate)
    texts = [read_windows(s, model, tokenizer, args.window, args.tokens, seed) for seed, s in enumerate(specs)]
    plans = read_plans(args.plans) if args.plans else search_plans(args, model, texts[0])
    speeds, rows = read_speeds(args.speeds), []
    with (args.out / "quality.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in measured(args, model, texts[0], texts[1], plans):
            row["tokens_per_second_8b"] = speeds.get((row["weights"].split(",")[0], args.head, row["target"]))
            writer.writerow(row)
            file.flush()
            print(" ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
            rows.append(row)
    tokens = texts[1].shape[0] * (texts[1].shape[1] // 2 - 1)
    title = f"{args.model}, {args.dtype} on {jax.devices()[0].device_kind}, {tokens} scored tokens of {args.evaluate}"
    (args.out / "quality.md").write_text(table(title, rows), encoding="utf-8")


def read_plans(folder: Path) -> list[SparsityPlan]:
    """The plans in a folder, by sparsity."""
    found = [SparsityPlan.load(file.parent) for file in sorted(folder.glob("*/plan.json"))]
    if not found:
        sys.exit(f"quality_table: {folder}: expected folders with a plan.json, found none")
    return sorted(found, key=lambda plan: plan.target)


def search_plans(args: Arguments, model: Llama, windows: Any) -> list[SparsityPlan]:
    """Plans of the default method for each sparsity, saved beside the table."""
    settings = ws.preset(args.config)
    plans = ws.calibrate_targets(model, windows, args.sparsities, settings=settings, progress=True, text=args.calibrate)
    for plan in plans:
        plan.save(args.out / "plans" / f"{plan.target:g}")
    return plans


def measured(
    args: Arguments, model: Llama, calibration: Any, windows: Any, plans: list[SparsityPlan]
) -> Iterator[dict[str, Any]]:
    """The rows: for each kind the dense model as it is, then in every basis the dense model and its plans."""
    large = read_config(shapes()[LARGE])
    bases = {None if plan.basis is None else plan.basis.digest(): plan.basis for plan in plans}
    for kind in args.kinds:
        weights, by_text = KINDS[kind]
        for digest, basis in ({None: None} | bases).items():
            wide = model if basis is None else ws.load(args.model, dtype=args.dtype, basis=basis)
            head = None if weights is None else args.head
            own = wide if weights is None else quantise(wide, weights, head, calibration if by_text else None)
            models: dict[str, Llama | SparseLlama] = {"0": own}
            by_name = {str(plan.target): plan for plan in plans}
            for name, plan in by_name.items():
                if digest == (None if plan.basis is None else plan.basis.digest()):
                    models[name] = apply(own, plan)
            result = ws.evaluate(model, windows, models)
            for name, score in result.sparse.items():
                sparsity = score.sparsity.mean
                yield {
                    "weights": kind,
                    "basis": "model" if basis is None else "plan",
                    "target": float(name),
                    "sparsity": sparsity,
                    "perplexity": score.perplexity.mean,
                    "perplexity_error": score.perplexity.error,
                    "kl": score.divergence.mean,
                    "kl_error": score.divergence.error,
                    "megabytes": bytes_of(model.config, weights, head, sparsity, args.context) / 1e6,
                    "gigabytes_8b": bytes_of(large, weights, head, sparsity, args.context) / 1e9,
                }


def bytes_of(config: LlamaConfig, weights: str | None, head: str | None, sparsity: float, context: int) -> float:
    """Bytes that one token reads at a model's shapes, with what is not rounded in bfloat16."""
    shapes = jax.eval_shape(lambda p: quantise_params(p, weights, head), param_shapes(config, "bfloat16"))
    return step_bytes(config, shapes, 1 - sparsity, context)


def read_speeds(path: Path) -> dict[tuple[str, str | None, float], float]:
    """Tokens a second by kind of weights, head and sparsity."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    heads = {"bfloat16": None}
    return {
        (r["weights"], heads.get(r["head"], r["head"]), float(r["sparsity"])): float(r["tokens_per_second"])
        for r in rows
    }


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        f"{title}\n",
        "| weights | basis | sparsity | perplexity | KL, nats/token | MB a token | GB at 8B | tok/s at 8B |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        speed = r["tokens_per_second_8b"]
        lines.append(
            f"| {r['weights']} | {r['basis']}'s | {r['sparsity']:.3f} | {r['perplexity']:.2f} ± "
            f"{r['perplexity_error']:.2f} | {r['kl']:.4f} ± {r['kl_error']:.4f} | {r['megabytes']:.1f} "
            f"| {r['gigabytes_8b']:.2f} | {'' if speed is None else f'{speed:.0f}'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
