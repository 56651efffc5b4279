"""Compare methods on one model: calibrated on every text, evaluated on every text, several sparsities and seeds.

    python scripts/compare_methods.py demo --calibrate self wikitext=wiki.txt@:300000 \
        --evaluate wikitext=wiki.txt@300000: books=books.txt --methods uniform teal wisparse wisparse-plus \
        --sparsities 0.5 0.65 --seeds 0 1 --config configs/quick.yaml --out runs/comparison

`--ablations "paper's order" alone together "left out"` adds methods with single parts switched; `--weights stored int8
"int4, compensated"` measures every plan, and the dense model, in these kinds of weights. Texts are `name=FILE`,
`name=FILE@start:stop` for a part of it in characters, or `self` for text that the dense model samples. Into the folder
go comparison.csv, one row for each variant, sparsity, kind of weights, calibration text, evaluation text and seed; the
plans; and run.json, what was run where. The same command goes on where a killed one stopped.
`scripts/plot_comparison.py` draws the rows and writes tables of them, also of several folders together.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from tyro.conf import Positional

import wisparse_jax as ws
from wisparse_jax.calibration import check_variety
from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation import split_windows
from wisparse_jax.evaluation.windows import read_text
from wisparse_jax.files import check_new_folder, read_json
from wisparse_jax.inference import sample_windows
from wisparse_jax.models.fingerprint import model_fingerprint
from wisparse_jax.models.model import Model
from wisparse_jax.report.comparison import (
    COLUMNS,
    EVALUATION_SEED,
    STORED,
    Row,
    append_rows,
    compare,
    conditions,
    read_rows,
)
from wisparse_jax.search import METHODS, SearchSettings, read_settings
from wisparse_jax.search.allocators import ALLOCATORS
from wisparse_jax.search.stages import Training
from wisparse_jax.search.state import identity_of
from wisparse_jax.sparsity import SparsityPlan

ROWS, RUN, PLANS, SEARCHES = "comparison.csv", "run.json", "plans", "searches"
# Groups of methods with some of their parts switched by the search's settings: variant, method, switches.
ABLATIONS: dict[str, list[tuple[str, str, dict[str, str]]]] = {
    "paper's order": [
        ("uniform", "uniform", {}),
        ("+ exponents", "wisparse", {"allocator": "uniform"}),
        ("+ layer budgets", "wisparse", {}),
    ],
    "alone": [
        ("eigenvector basis", "uniform", {"basis": "eigen"}),
        ("refined basis", "uniform", {"basis": "refined"}),
        ("weight-norm scores", "wina", {"allocator": "uniform"}),
        ("gradient scores", "wina", {"allocator": "uniform", "gains": "gradients"}),
        ("second-order budgets", "uniform", {"allocator": "second-order"}),
        ("biases", "uniform", {"biases": "on"}),
    ],
    "together": [
        ("refined basis", "uniform", {"basis": "refined"}),
        ("+ gradient scores", "wina", {"allocator": "uniform", "basis": "refined", "gains": "gradients"}),
        ("+ second-order budgets", "wisparse-plus", {"gains": "gradients", "biases": "off"}),
        ("+ trained scores", "wisparse-plus", {"biases": "off"}),
        ("+ biases", "wisparse-plus", {}),
    ],
    "left out": [
        ("basis", "wisparse-plus", {"basis": "none"}),
        ("refinement", "wisparse-plus", {"basis": "eigen"}),
        ("trained scores", "wisparse-plus", {"gains": "gradients"}),
        ("gradient scores", "wisparse-plus", {"gains": "norms"}),
        ("second-order budgets", "wisparse-plus", {"allocator": "uniform"}),
        ("biases", "wisparse-plus", {"biases": "off"}),
    ],
}


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
    ablations: tuple[str, ...] = ()  # groups of them
    allocators: tuple[str, ...] = ()  # these, with everything else as in --allocators-with
    allocators_with: str = "uniform"  # the method; its biases are off
    weights: tuple[str, ...] = (STORED,)  # kinds, such as int8, int4, "int4, compensated"
    head: str | None = None  # "int8" rounds the head of every rounded kind


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method with some of its parts switched; `group` is what it is drawn with."""

    name: str
    method: str
    switches: dict[str, str] = dataclasses.field(default_factory=dict)
    group: str = "method"


def main() -> None:
    """Run the comparison."""
    args = tyro.cli(Arguments, description=__doc__)
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        run(args)
    except WisparseError as error:
        sys.exit(f"compare_methods: {error}")


def run(args: Arguments) -> None:
    """Every calibration text and seed whose rows are not in the folder yet."""
    check_names(args)
    # TEAL is one of the methods here: no need for each plan to search it for its held-out figures.
    settings = dataclasses.replace(read_settings(args.config), compare_teal=False)
    variants = variants_of(args.methods, args.ablations, args.allocators, args.allocators_with)
    model, tokenizer = ws.load(args.model, "float32"), ws.load_tokenizer(args.model)

    read = functools.partial(read_windows, model, tokenizer, settings.window)
    texts = {split_name(spec)[0]: read(spec, args.tokens, EVALUATION_SEED) for spec in args.evaluate}
    record = {"command": " ".join(["python", "scripts/compare_methods.py", *sys.argv[1:]]), "model": args.model}
    record |= {"dtype": "float32, matmul precision highest"} | conditions(settings)
    models = len(args.sparsities) * len(variants) * len(args.weights)
    rows = begun(args, record, model, len(args.evaluate) * models)
    finished = {(row["calibration"], row["seed"]) for row in rows}
    for spec, seed in itertools.product(args.calibrate, args.seeds):
        text = split_name(spec)[0]
        if (text, seed) in finished:
            continue
        windows, plans = read(spec, settings.tokens, seed), {}
        for number, variant in enumerate(variants, 1):
            print(f"{text}, seed {seed}: {variant.name}, variant {number} of {len(variants)}", file=sys.stderr)
            found = plans_of(args, model, windows, text, variant, seed, settings)
            plans |= {(variant.name, target): plan for target, plan in found.items()}
        common = {"model": args.model, "calibration": text, "seed": seed, "calibration_tokens": windows.size}
        by_name = {variant.name: variant for variant in variants}
        for row in compare(model, plans, texts, args.weights, args.head, windows):
            variant = by_name.get(row["variant"], Variant("dense", ""))
            row |= common | {"group": "weights" if args.weights != (STORED,) else variant.group}
            row["switches"] = json.dumps(variant.switches) if variant.switches else ""
            rows.append(row)
        write_rows(args.out / ROWS, rows)
    shutil.rmtree(args.out / SEARCHES, ignore_errors=True)
    print(f"{args.out / ROWS}: {len(rows)} rows; python scripts/plot_comparison.py {args.out} --out FIGURES draws them")


def begun(args: Arguments, record: dict[str, Any], model: Model, models: int) -> list[Row]:
    """The rows of the texts and seeds that a former run of the same command ended; a new folder has none."""
    asked = {name: value for name, value in dataclasses.asdict(args).items() if name not in ("out", "config")}
    same = {name: record[name] for name in ("device", "versions", "settings")}
    files = [part_of(spec) for spec in (*args.calibrate, *args.evaluate) if spec != "self"]
    record["identity"] = identity_of(asked, same, files, model_fingerprint(model))
    file = args.out / RUN
    if not args.out.is_dir() or not any(path.name != f"{RUN}.new" for path in args.out.iterdir()):
        if not args.out.is_dir():
            check_new_folder(args.out, WisparseError)
            args.out.mkdir(parents=True)
        new = file.with_name(f"{RUN}.new")
        new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        new.replace(file)
        return []
    if not file.exists():
        raise WisparseError(f"{args.out}: exists already, and holds no comparison; nothing is overwritten")
    if read_json(file, dict[str, Any], WisparseError).get("identity") != record["identity"]:
        raise WisparseError(f"{args.out}: holds another comparison: other arguments, texts, model, device or versions")
    print(f"going on with the comparison in {args.out}", file=sys.stderr, flush=True)
    rows = read_rows([args.out], [ROWS])
    if any(set(row) != set(COLUMNS) for row in rows):
        raise WisparseError(f"{args.out / ROWS}: damaged: expected the columns {', '.join(COLUMNS)}")
    count = Counter((row["calibration"], row["seed"]) for row in rows if row["variant"] != "dense")
    return [row for row in rows if count[row["calibration"], row["seed"]] == models]


def write_rows(file: Path, rows: list[Row]) -> None:
    """Write a table whole: a killed run leaves the one before."""
    new = file.with_name(f"{file.name}.new")
    new.unlink(missing_ok=True)
    append_rows(new, COLUMNS, rows)
    new.replace(file)


def plans_of(
    args: Arguments, model: Model, windows: np.ndarray, text: str, variant: Variant, seed: int, settings: SearchSettings
) -> dict[float, SparsityPlan]:
    """A variant's plans by target, as they are in the folder; calibrated first where they are not."""
    name = f"{text}-{variant.name}".replace(" ", "_")
    folders = {target: args.out / PLANS / f"{name}-{target:g}-{seed}" for target in args.sparsities}
    if not all(folder.exists() for folder in folders.values()):
        state, targets = args.out / SEARCHES / f"{name}-{seed}", list(folders)
        switched = dataclasses.replace(settings, **variant.switches)  # pyright: ignore[reportArgumentType]
        plans = ws.calibrate_targets(model, windows, targets, variant.method, seed, switched, True, text, state)
        for note in plans[-1].history.get("notes", []):  # the last one's are those of all
            print(f"  {note}", file=sys.stderr)
        for folder, plan in zip(folders.values(), plans, strict=True):
            if not folder.exists():
                plan.save(folder)
        ws.remove_state(state)
    return {target: SparsityPlan.load(folder) for target, folder in folders.items()}


def variants_of(
    methods: tuple[str, ...], ablations: tuple[str, ...], allocators: tuple[str, ...], allocators_with: str
) -> list[Variant]:
    """The variants that a comparison was asked for."""
    for kind, names, known in (
        ("methods", methods, METHODS), ("ablations", ablations, ABLATIONS), ("allocators", allocators, ALLOCATORS),
        ("allocators-with", (allocators_with,), METHODS),
    ):  # fmt: skip
        if unknown := [name for name in names if name not in known]:
            raise WisparseError(f"{kind}: {unknown[0]!r}: expected some of {', '.join(map(repr, known))}")
        if len(set(names)) < len(names):
            raise WisparseError(f"{kind}: expected none twice, found {', '.join(map(repr, names))}")
    if not (methods or ablations or allocators):
        raise WisparseError("methods, ablations and allocators: expected one at least, found none")
    switches = {"biases": "off"}
    if METHODS[allocators_with].stage(Training).gains:
        switches["gains"] = "gradients"  # what is trained would stand for the budgets
    groups = {group: ABLATIONS[group] for group in ABLATIONS if group in ablations}
    spread = [(name, allocators_with, switches | {"allocator": name}) for name in allocators]
    groups[f"allocator on {allocators_with}"] = spread
    return [Variant(name, name) for name in methods] + [
        Variant(f"{group}: {name}", method, parts, group)
        for group, rows in groups.items()
        for name, method, parts in rows
    ]


def check_names(args: Arguments) -> None:
    """Names of texts, sparsities and seeds name folders and rows: refuse what would share one."""
    if EVALUATION_SEED in args.seeds:
        raise WisparseError(f"seeds: {EVALUATION_SEED} is that of the texts that plans are scored on")
    names = [[split_name(spec)[0] for spec in specs] for specs in (args.calibrate, args.evaluate)]
    for name in itertools.chain(*names):
        if not re.fullmatch(r"[\w.-]+", name):
            raise WisparseError(f"{name!r}: expected a name of letters, digits, '_', '.' and '-' before the '='")
    asked = {"calibrate": names[0], "evaluate": names[1], "seeds": list(map(str, args.seeds))}
    asked |= {"sparsities": [f"{value:g}" for value in args.sparsities], "weights": list(args.weights)}
    for option, values in asked.items():
        if not values or len(set(values)) < len(values):
            raise WisparseError(f"{option}: expected at least one, and none twice, found {', '.join(values)}")


def split_name(spec: str) -> tuple[str, str]:
    """`name=file` taken apart; `self` is its own name."""
    name, _, file = spec.partition("=")
    if not name or (not file and name != "self"):
        raise WisparseError(f"{spec!r}: expected name=FILE, name=FILE@start:stop, or self")
    return name, file


def part_of(spec: str) -> str:
    """The text of a file, or the part of it between two characters."""
    file = split_name(spec)[1]
    part = re.fullmatch(r"(.*)@(\d*):(\d*)", file)
    path, start, stop = part.groups() if part else (file, "", "")
    return read_text(path)[int(start or 0) : int(stop) if stop else None]


def read_windows(model: Model, tokenizer: Any, window: int, spec: str, tokens: int, seed: int) -> np.ndarray:
    """The windows of a text, or as many that the model samples."""
    window = min(window, model.config.context)
    if split_name(spec)[0] == "self":
        windows = sample_windows(model, -(-tokens // window), window, seed=seed)
    else:
        try:
            windows = split_windows(tokenizer, part_of(spec), window, tokens)
        except WisparseError as error:
            raise WisparseError(f"{spec}: {error}") from None
    check_variety(windows, model.config.vocab_size)
    return windows


if __name__ == "__main__":
    main()
