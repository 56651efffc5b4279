"""BLiMP accuracy of saved plans, each against the dense model on the same pairs.

    python scripts/blimp_of_plans.py MODEL blimp.jsonl.xz --plan PLAN --plan PLAN

The file holds minimal pairs, a JSON object a line with sentence_good and sentence_bad; how they are scored: blimp.py.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import tyro
from blimp import judgements, read_pairs
from tyro.conf import Positional, UseAppendAction

import wisparse_jax as ws
from wisparse_jax.arguments import check_count
from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation.quality import Figure
from wisparse_jax.sparsity import SparsityPlan


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Score plans on minimal pairs."""

    model: Positional[str]
    file: Positional[Path]
    plan: UseAppendAction[tuple[Path, ...]] = ()
    pairs: int = 2_000  # of the file, evenly spaced
    dtype: str = "float32"


def main() -> None:
    """Print the table."""
    args = tyro.cli(Arguments, description=__doc__)
    began = time.perf_counter()
    try:
        check_count(args.pairs, "pairs", least=2)
        if twice := [folder for folder, count in Counter(args.plan).items() if count > 1]:
            raise WisparseError(f"--plan {twice[0]} is given more than once")
        pairs, plans = read_pairs(args.file, args.pairs), [SparsityPlan.load(folder) for folder in args.plan]
        model, tokenizer = ws.load(args.model, args.dtype), ws.load_tokenizer(args.model)
        names = [f"{plan.method}, {plan.target:g}, {folder}" for plan, folder in zip(plans, args.plan, strict=True)]
        sparse = ws.apply_plans(model, dict(zip(names, plans, strict=True)))
        with jax.default_matmul_precision("highest"):
            right = judgements(model, tokenizer, pairs, sparse)
    except WisparseError as error:
        sys.exit(f"blimp_of_plans: {error}")
    print("| plan | accuracy | minus dense, paired |\n|---|---|---|")
    for name, own in right.items():
        share, paired = Figure.over(own.astype(float)), Figure.over(own.astype(float) - right["dense"])
        print(f"| {name} | {share:.4f} | {'' if name == 'dense' else f'{paired:+.4f}'} |")
    device, seconds = jax.devices()[0].device_kind, time.perf_counter() - began
    print(f"\n{len(pairs):,} pairs, {args.dtype} on {device}, jax {jax.__version__}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
