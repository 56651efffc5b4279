"""Second-order costs against the truth: the KL that they predict for random plans, and the KL that these plans have.

    python scripts/predicted_against_measured.py demo --calibrate self --evaluate wikitext=wiki.txt --out runs/predicted

Random budgets lie around uniform, around the second-order budget, and between the two, all at one target. Into the
folder go predicted.csv, one row a plan, and predicted.json, the correlations and conditions;
`scripts/plot_comparison.py` draws them.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from comparison_texts import read_windows, split_name
from tyro.conf import Positional

import wisparse_jax as ws
from wisparse_jax.calibration import Calibration, SearchSettings, read_settings
from wisparse_jax.errors import WisparseError
from wisparse_jax.files import check_new_folder
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.fingerprint import model_fingerprint
from wisparse_jax.search import BudgetProblem
from wisparse_jax.search.allocators import ALLOCATORS, get_allocator
from wisparse_jax.search.judge import held_out_windows
from wisparse_jax.sparsity.apply import in_basis
from wisparse_jax.sparsity.budget import project_to_mean

COLUMNS = (
    "model", "method", "sparsity", "calibration", "evaluation", "plan", "predicted", "measured", "error", "realised",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare predicted and measured KL of random plans."""

    model: Positional[str]
    out: Path  # a new folder
    calibrate: str = "self"
    evaluate: str = "self"
    method: str = "wisparse-plus"  # whose basis and scores; its biases are off
    plan: Path | None = None  # a saved plan whose basis and scores are taken instead; --calibrate as it was for it
    sparsity: float = 0.5
    allocators: tuple[str, ...] = ("uniform", "greedy", "second-order")  # their budgets come first
    plans: int = 60  # random ones
    spread: float = 0.1  # standard deviation of the random part of a layer's sparsity
    together: int = 10  # plans that are evaluated in one go
    tokens: int = 16_384  # evaluation text, of which half are scored
    config: Path | None = None
    seed: int = 0


def main() -> None:
    """Run it."""
    args = tyro.cli(Arguments, description=__doc__)
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        compare(args)
    except (WisparseError, FileExistsError) as error:
        sys.exit(f"predicted_against_measured: {error}")


def compare(args: Arguments) -> None:
    """Calibrate, draw the plans, measure them, write the folder."""
    settings = dataclasses.replace(read_settings(args.config), biases="off", compare_teal=False)
    check_new_folder(args.out, WisparseError)
    if unknown := [name for name in args.allocators if name not in ALLOCATORS]:
        raise WisparseError(f"allocators: {unknown[0]!r}: expected some of {', '.join(map(repr, ALLOCATORS))}")
    if len(args.allocators) + args.plans < 3:
        raise WisparseError("allocators and plans: expected 3 plans at least, for a correlation")
    plan = None if args.plan is None else dataclasses.replace(ws.SparsityPlan.load(args.plan), biases=None)
    if plan is not None and args.method != plan.method:
        raise WisparseError(f"{args.plan}: is a plan of {plan.method}, expected one of --method {args.method}")
    model, tokenizer = ws.load(args.model, "float32"), ws.load_tokenizer(args.model)
    if plan is not None:
        plan.check_model(model_fingerprint(model), model.config)
    windows = read_windows(args.calibrate, model, tokenizer, settings.window, settings.tokens, args.seed)
    ids = read_windows(args.evaluate, model, tokenizer, settings.window, args.tokens, args.seed + 1000)
    args.out.mkdir(parents=True)
    if plan is None:
        plan = ws.calibrate(model, windows, args.sparsity, args.method, args.seed, settings)
    # As in the search: costs on most of the text, the thresholds of plans with a basis on the windows held out.
    held = held_out_windows(len(windows), settings)
    training = windows[: len(windows) - held]
    calibration, other = (
        _with_gains(ws.run_dense(model, part, settings, args.seed, basis=plan.basis), plan)
        for part in (training, windows[-held:] if held and plan.basis is not None else training)
    )
    problem = BudgetProblem(calibration, plan.exponents, settings, args.seed).aim(args.sparsity)
    names, tables = zip(*budgets(problem, args.allocators, args.plans, args.spread), strict=True)
    predicted = [problem.predicted(table) for table in tables]
    folded = in_basis(model, plan.basis)
    rows = []
    for at in range(0, len(tables), args.together):
        sparse = {}
        for k in range(at, min(at + args.together, len(tables))):
            made = ws.with_budgets(other, plan, tables[k])
            sparse[str(k)] = ws.apply(folded, made)
        result = ws.evaluate(model, ids, sparse)
        for key, score in result.sparse.items():
            kl = score.divergence
            texts = [split_name(spec)[0] for spec in (args.calibrate, args.evaluate)]
            where = (args.model, plan.method, args.sparsity, *texts)
            values = (predicted[int(key)], kl.mean, kl.error, score.sparsity.mean)
            rows.append((*where, names[int(key)], *(f"{value:.6g}" for value in values)))
        print(f"{len(rows)} of {len(tables)} plans", file=sys.stderr, flush=True)
    with (args.out / "predicted.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    measured = np.asarray([float(row[-3]) for row in rows])
    report = correlations(np.asarray(predicted), measured) | _conditions(args, settings)
    (args.out / "predicted.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in report.items() if name != "settings"}, indent=1))


def _with_gains(calibration: Calibration, plan: ws.SparsityPlan) -> Calibration:
    return calibration if plan.gains is None else calibration.with_gains(plan.gains)


def budgets(
    problem: BudgetProblem, allocators: tuple[str, ...], count: int, spread: float
) -> list[tuple[str, np.ndarray]]:
    """Names and tables: those of the allocators, then random ones; every mean is the target."""
    rng = np.random.default_rng(problem.seed)
    found = [(name, get_allocator(name)(problem).sparsities) for name in allocators]
    low, high = problem.uniform(), get_allocator("second-order")(problem).sparsities
    weights = np.tile(problem.weights, problem.blocks)
    for k in range(count):
        centre = low + rng.uniform(0.0, 1.0) * (high - low)
        # Some plans move whole blocks, some kinds of layers, some every layer by itself.
        shape = ((problem.blocks, 1), (1, len(LAYERS)), low.shape)[k % 3]
        moved = (centre + rng.uniform(0.2, 1.0) * spread * rng.normal(size=shape)).ravel()
        table = project_to_mean(moved, weights, problem.target, 0.0, problem.max_sparsity)
        found.append((("blocks", "kinds of layers", "layers")[k % 3], table.reshape(low.shape)))
    return found


def correlations(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Pearson's of the values and of their ranks (Spearman's), and the mean ratio of the two."""

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.argsort(np.argsort(values))

    return {
        "plans": len(predicted),
        "pearson": float(np.corrcoef(predicted, measured)[0, 1]),
        "spearman": float(np.corrcoef(ranks(predicted), ranks(measured))[0, 1]),
        "measured over predicted": float(np.mean(measured / predicted)),
    }


def _conditions(args: Arguments, settings: SearchSettings) -> dict[str, object]:
    return {
        "command": " ".join(["python", "scripts/predicted_against_measured.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": jax.devices()[0].device_kind,
        "versions": {"wisparse_jax": ws.__version__, "jax": jax.__version__},
        "settings": dataclasses.asdict(settings),
    }


if __name__ == "__main__":
    main()
