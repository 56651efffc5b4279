"""Compare methods on one model: calibrated on every text, evaluated on every text, several sparsities and seeds.

    python scripts/compare_methods.py demo --calibrate self wikitext=wiki.txt@:300000 \
        --evaluate wikitext=wiki.txt@300000: books=books.txt --methods uniform teal wisparse wisparse-plus \
        --sparsities 0.5 0.65 --seeds 0 1 --config configs/quick.yaml --out runs/comparison

`--ablations "paper's order" alone together "left out"` adds methods with single parts switched. Texts are `name=FILE`,
`name=FILE@start:stop` for a part of it in characters, or `self` for text that the dense model samples. Into the folder
go comparison.csv, one row for each variant, sparsity, calibration text, evaluation text and seed; layers.csv, the plans
by layer; run.json, what was run where; and summary.md. Rows are written as they come. `scripts/plot_comparison.py`
draws them, also of several folders together.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from blimp import accuracies, read_pairs
from comparison_report import LAYER_COLUMNS, write_summary
from comparison_texts import read_windows, split_name
from comparison_variants import variants_of
from tyro.conf import Positional

import wisparse_jax as ws
from wisparse_jax.calibration import SearchSettings, read_settings
from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import LAYERS
from wisparse_jax.report.comparison import COLUMNS, EVALUATION_SEED, append_rows, conditions, figures, key
from wisparse_jax.sparsity import SparsityPlan


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare methods on one model."""

    model: Positional[str]
    out: Path  # a new folder
    calibrate: tuple[str, ...] = ("self",)
    evaluate: tuple[str, ...] = ("self",)
    methods: tuple[str, ...] = ("uniform", "wina", "teal", "wisparse", "wisparse-plus")
    sparsities: tuple[float, ...] = (0.5,)
    seeds: tuple[int, ...] = (0,)
    config: Path | None = None
    tokens: int = 32_768  # of each evaluation text, in whole windows of the settings' length; half of them are scored
    ablations: tuple[str, ...] = ()  # groups of them: "paper's order", "alone", "together", "left out"
    allocators: tuple[str, ...] = ()  # these, with everything else as in --allocators-with
    allocators_with: str = "uniform"  # the method; its biases are off
    blimp: Path | None = None  # jsonl or jsonl.xz of minimal pairs
    save_plans: bool = False  # into the folder plans
    blimp_pairs: int = 2_000  # of them, evenly spaced


def main() -> None:
    """Run the comparison."""
    args = tyro.cli(Arguments, description=__doc__)
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        Comparison(args).run()
    except (WisparseError, FileExistsError) as error:
        sys.exit(f"compare_methods: {error}")


class Comparison:
    """The model, the texts and the open tables."""

    def __init__(self, args: Arguments):
        self.args = args
        if EVALUATION_SEED in args.seeds:
            raise WisparseError(f"seeds: {EVALUATION_SEED} is that of the texts that plans are scored on")
        # TEAL is one of the methods here: no need for each plan to search it for its held-out figures.
        self.settings = dataclasses.replace(read_settings(args.config), compare_teal=False)
        self.variants = variants_of(args.methods, args.ablations, args.allocators, args.allocators_with)
        for spec in (*args.calibrate, *args.evaluate):
            split_name(spec)
        self.pairs = None if args.blimp is None else read_pairs(args.blimp, args.blimp_pairs)
        self.model, self.tokenizer = ws.load(args.model, "float32"), ws.load_tokenizer(args.model)
        self.held_out = {
            split_name(spec)[0]: self._windows(spec, args.tokens, EVALUATION_SEED) for spec in args.evaluate
        }
        args.out.mkdir(parents=True)
        (args.out / "run.json").write_text(json.dumps(_conditions(args, self.settings), indent=1) + "\n")
        self.rows: list[dict[str, Any]] = []

    def _windows(self, spec: str, tokens: int, seed: int) -> np.ndarray:
        return read_windows(spec, self.model, self.tokenizer, self.settings.window, tokens, seed)

    def run(self) -> None:
        """Every calibration text and seed, then the summary."""
        for spec in self.args.calibrate:
            for seed in self.args.seeds:
                self._compare(split_name(spec)[0], self._windows(spec, self.settings.tokens, seed), seed)
                write_summary(self.args.out, self.rows, _conditions(self.args, self.settings))
        print((self.args.out / "summary.md").read_text(encoding="utf-8"))

    def _compare(self, text: str, windows: np.ndarray, seed: int) -> None:
        """All variants calibrated on one text with one seed, evaluated together on all texts."""
        plans: dict[tuple[str, float], SparsityPlan] = {}
        for variant in self.variants:
            print(f"{text}, seed {seed}: {variant.name}", file=sys.stderr, flush=True)
            settings = dataclasses.replace(self.settings, **variant.switches)
            made = ws.calibrate_targets(
                self.model, windows, self.args.sparsities, variant.method, seed, settings, text=text
            )
            for note in made[-1].history.get("notes", []):  # the last one's are those of all
                print(f"  {note}", file=sys.stderr)
            plans |= {(variant.name, target): plan for target, plan in zip(self.args.sparsities, made, strict=True)}
        self._record_layers(text, seed, plans)
        for (name, target), plan in plans.items() if self.args.save_plans else ():
            plan.save(self.args.out / "plans" / f"{text}-{name}-{target:g}-{seed}".replace(" ", "_"))
        sparse = ws.apply_plans(self.model, {key(*which): plan for which, plan in plans.items()})
        task = {} if self.pairs is None else accuracies(self.model, self.tokenizer, self.pairs, sparse)
        rows = []
        for evaluated, ids in self.held_out.items():
            result = ws.evaluate(self.model, ids, sparse)
            for variant in self.variants:
                for target in self.args.sparsities:
                    name = key(variant.name, target)
                    row: dict[str, Any] = {
                        "model": self.args.model, "group": variant.group, "variant": variant.name,
                        "method": variant.method, "switches": json.dumps(variant.switches) if variant.switches else "",
                        "sparsity": target, "calibration": text, "evaluation": evaluated, "seed": seed,
                        "calibration_tokens": windows.size,
                        "blimp": task.get(name), "dense_blimp": task.get("dense"),
                        "blimp_pairs": None if self.pairs is None else len(self.pairs),
                    }  # fmt: skip
                    row |= figures(result, variant.name, target, plans[variant.name, target])
                    rows.append(row)
        self.rows += rows
        append_rows(self.args.out / "comparison.csv", COLUMNS, rows)

    def _record_layers(self, text: str, seed: int, plans: dict[tuple[str, float], SparsityPlan]) -> None:
        rows = []
        for (name, target), plan in plans.items():
            for b, i in np.ndindex(plan.sparsities.shape):
                values = {"exponent": plan.exponents[b, i], "layer_sparsity": plan.sparsities[b, i]}
                values["layer_weights"] = plan.layer_weights[i]
                where = {"variant": name, "sparsity": target, "calibration": text, "seed": seed}
                rows.append({"model": self.args.model, **where, "block": b, "layer": LAYERS[i], **values})
        append_rows(self.args.out / "layers.csv", LAYER_COLUMNS, rows)


def _conditions(args: Arguments, settings: SearchSettings) -> dict[str, Any]:
    return {
        "command": " ".join(["python", "scripts/compare_methods.py", *sys.argv[1:]]),
        "model": args.model,
        "dtype": "float32, matmul precision highest",
    } | conditions(settings)


if __name__ == "__main__":
    main()
