"""Compare methods on one model: calibrated on every text, evaluated on every text, several sparsities and seeds.

    python scripts/compare_methods.py demo --calibrate self wikitext=wiki.txt@:300000 \
        --evaluate wikitext=wiki.txt@300000: books=books.txt --methods uniform teal wisparse wisparse-plus \
        --sparsities 0.5 0.65 --seeds 0 1 --config configs/quick.yaml --out runs/comparison

`--ablations "paper's order" alone together "left out"` adds methods with single parts switched. Texts are `name=FILE`,
`name=FILE@start:stop` for a part of it in characters, or `self` for text that the dense model samples. Into the folder
go comparison.csv, one row for each variant, sparsity, calibration text, evaluation text and seed; layers.csv, the plans
by layer; plans; run.json, what was run where; and summary.md. The same command goes on where a killed one stopped.
`scripts/plot_comparison.py` draws the rows, also of several folders together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from blimp import accuracies, read_pairs
from comparison_report import LAYER_COLUMNS, write_summary
from comparison_texts import read_text, read_windows, split_name
from comparison_variants import Variant, variants_of
from tyro.conf import Positional

import wisparse_jax as ws
from wisparse_jax.calibration import SearchSettings, read_settings
from wisparse_jax.errors import WisparseError
from wisparse_jax.files import check_new_folder, read_json
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.fingerprint import model_fingerprint
from wisparse_jax.report.comparison import (
    COLUMNS,
    EVALUATION_SEED,
    Row,
    append_rows,
    conditions,
    figures,
    key,
    read_rows,
)
from wisparse_jax.search.state import identity_of
from wisparse_jax.sparsity import SparsityPlan

ROWS, LAYER_ROWS, CONDITIONS, PLANS, SEARCHES = "comparison.csv", "layers.csv", "run.json", "plans", "searches"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare methods on one model."""

    model: Positional[str]
    out: Path  # a new folder, or that of the same command when it was stopped
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
    blimp_pairs: int = 2_000  # of them, evenly spaced


def main() -> None:
    """Run the comparison."""
    args = tyro.cli(Arguments, description=__doc__)
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        Comparison(args).run()
    except WisparseError as error:
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
        _check_names(args)
        self.pairs = None if args.blimp is None else read_pairs(args.blimp, args.blimp_pairs)
        self.model, self.tokenizer = ws.load(args.model, "float32"), ws.load_tokenizer(args.model)
        self.held_out = {
            split_name(spec)[0]: self._windows(spec, args.tokens, EVALUATION_SEED) for spec in args.evaluate
        }
        self.rows: list[Row] = []
        self.layer_rows: list[Row] = []
        self.finished: set[tuple[str, int]] = set()  # texts and seeds that a former run ended
        self._open()

    def _open(self) -> None:
        """A new folder, or what the same command has left in it: texts and seeds that it finished stay as they are."""
        out = self.args.out
        asked = {k: v for k, v in dataclasses.asdict(self.args).items() if k not in ("out", "config", "blimp")}
        self.conditions = _conditions(self.args, self.settings)
        run = {name: self.conditions[name] for name in ("device", "versions", "settings")}
        files = [read_text(spec) for spec in (*self.args.calibrate, *self.args.evaluate) if spec != "self"]
        identity = identity_of(asked, run, files, self.pairs, model_fingerprint(self.model))
        self.conditions["identity"] = identity
        begun = out.is_dir() and any(path.name != f"{CONDITIONS}.new" for path in out.iterdir())
        if not begun:
            if not out.is_dir():
                check_new_folder(out, WisparseError)
                out.mkdir(parents=True)
            with self._whole(CONDITIONS) as file:
                file.write_text(json.dumps(self.conditions, indent=1) + "\n", encoding="utf-8")
            return
        if not (out / CONDITIONS).exists():
            raise WisparseError(f"{out}: exists already, and holds no comparison; nothing is overwritten")
        self.conditions = read_json(out / CONDITIONS, dict[str, Any], WisparseError)
        if self.conditions.get("identity") != identity:
            raise WisparseError(f"{out}: holds another comparison: other arguments, texts, model, device or versions")
        print(f"going on with the comparison in {out}", file=sys.stderr, flush=True)
        self._take_up()

    def _take_up(self) -> None:
        """The rows of the texts and seeds that a former run ended; what it had begun is found again."""
        out = self.args.out
        rows, layers = read_rows([out], [ROWS]), read_rows([out], [LAYER_ROWS])
        for name, columns, found in ((ROWS, COLUMNS, rows), (LAYER_ROWS, LAYER_COLUMNS, layers)):
            if any(set(row) != set(columns) for row in found):
                raise WisparseError(f"{out / name}: damaged: expected the columns {', '.join(columns)}")
        plans = len(self.variants) * len(self.args.sparsities)
        linears = self.model.config.num_blocks * len(LAYERS)
        count, all_layers = (Counter((row["calibration"], row["seed"]) for row in table) for table in (rows, layers))
        self.finished = {
            group
            for group, number in count.items()
            if number == plans * len(self.args.evaluate) and all_layers[group] == plans * linears
        }
        self.rows, self.layer_rows = (
            [row for row in table if (row["calibration"], row["seed"]) in self.finished] for table in (rows, layers)
        )

    @contextlib.contextmanager
    def _whole(self, name: str) -> Iterator[Path]:
        """A file to write, which gets its name when it is written: a killed run leaves the one before."""
        new = self.args.out / f"{name}.new"
        new.unlink(missing_ok=True)
        yield new
        new.replace(self.args.out / name)

    def _windows(self, spec: str, tokens: int, seed: int) -> np.ndarray:
        return read_windows(spec, self.model, self.tokenizer, self.settings.window, tokens, seed)

    def run(self) -> None:
        """Every calibration text and seed, then the summary."""
        for spec in self.args.calibrate:
            for seed in self.args.seeds:
                if (split_name(spec)[0], seed) not in self.finished:
                    self._compare(split_name(spec)[0], self._windows(spec, self.settings.tokens, seed), seed)
                write_summary(self.args.out, self.rows, self.conditions)
        shutil.rmtree(self.args.out / SEARCHES, ignore_errors=True)
        print((self.args.out / "summary.md").read_text(encoding="utf-8"))

    def _plans(self, variant: Variant, text: str, windows: np.ndarray, seed: int) -> dict[float, SparsityPlan]:
        """A variant's plans as they are in the folder, calibrated first where they are not."""

        def name(target: float) -> str:
            return f"{text}-{variant.name}-{target:g}-{seed}".replace(" ", "_")

        folders = {target: self.args.out / PLANS / name(target) for target in self.args.sparsities}
        if not all(folder.exists() for folder in folders.values()):
            settings = dataclasses.replace(self.settings, **variant.switches)
            state = self.args.out / SEARCHES / f"{text}-{variant.name}-{seed}".replace(" ", "_")
            made = ws.calibrate_targets(
                self.model, windows, list(folders), variant.method, seed, settings, True, text, state
            )
            for note in made[-1].history.get("notes", []):  # the last one's are those of all
                print(f"  {note}", file=sys.stderr)
            for folder, plan in zip(folders.values(), made, strict=True):
                if not folder.exists():
                    plan.save(folder)
            ws.remove_state(state)
        return {target: SparsityPlan.load(folder) for target, folder in folders.items()}

    def _compare(self, text: str, windows: np.ndarray, seed: int) -> None:
        """All variants calibrated on one text with one seed, evaluated together on all texts."""
        plans: dict[tuple[str, float], SparsityPlan] = {}
        for number, variant in enumerate(self.variants, 1):
            where = f"variant {number} of {len(self.variants)}"
            print(f"{text}, seed {seed}: {variant.name}, {where}", file=sys.stderr, flush=True)
            made = self._plans(variant, text, windows, seed)
            plans |= {(variant.name, target): plan for target, plan in made.items()}
        self._record_layers(text, seed, plans)
        sparse = ws.apply_plans(self.model, {key(*which): plan for which, plan in plans.items()})
        task = {} if self.pairs is None else accuracies(self.model, self.tokenizer, self.pairs, sparse)
        rows = []
        for evaluated, ids in self.held_out.items():
            result = ws.evaluate(self.model, ids, sparse)
            for variant in self.variants:
                for target in self.args.sparsities:
                    name = key(variant.name, target)
                    row: Row = {
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
        with self._whole(ROWS) as file:
            append_rows(file, COLUMNS, self.rows)

    def _record_layers(self, text: str, seed: int, plans: dict[tuple[str, float], SparsityPlan]) -> None:
        for (name, target), plan in plans.items():
            for b, i in np.ndindex(plan.sparsities.shape):
                values = {"exponent": plan.exponents[b, i], "layer_sparsity": plan.sparsities[b, i]}
                values["layer_weights"] = plan.layer_weights[i]
                where = {"variant": name, "sparsity": target, "calibration": text, "seed": seed}
                self.layer_rows.append({"model": self.args.model, **where, "block": b, "layer": LAYERS[i], **values})
        with self._whole(LAYER_ROWS) as file:
            append_rows(file, LAYER_COLUMNS, self.layer_rows)


def _check_names(args: Arguments) -> None:
    """Names of texts, sparsities and seeds name folders and rows: refuse what would share one."""
    names = [[split_name(spec)[0] for spec in specs] for specs in (args.calibrate, args.evaluate)]
    for name in itertools.chain(*names):
        if not re.fullmatch(r"[\w.-]+", name):
            raise WisparseError(f"{name!r}: expected a name of letters, digits, '_', '.' and '-' before the '='")
    asked = {"calibrate": names[0], "evaluate": names[1], "seeds": list(map(str, args.seeds))}
    asked["sparsities"] = [f"{value:g}" for value in args.sparsities]
    for option, values in asked.items():
        if not values or len(set(values)) < len(values):
            raise WisparseError(f"{option}: expected at least one, and none twice, found {', '.join(values)}")


def _conditions(args: Arguments, settings: SearchSettings) -> dict[str, Any]:
    return {
        "command": " ".join(["python", "scripts/compare_methods.py", *sys.argv[1:]]),
        "model": args.model,
        "dtype": "float32, matmul precision highest",
    } | conditions(settings)


if __name__ == "__main__":
    main()
