"""`wisparse demo`: the whole method on the model that ships with the package."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation import evaluate
from wisparse_jax.inference import Sample, generate, sample_windows
from wisparse_jax.models.loading import load, load_tokenizer, model_fingerprint
from wisparse_jax.report.tables import console, quality_table, timing_table
from wisparse_jax.search import SearchSettings, run_dense, search_plan
from wisparse_jax.sparsity import METHODS, apply

# Planned for two CPU cores: about a minute and a half of search in all.
SETTINGS = SearchSettings(
    tokens=8_192,
    statistics_tokens=2_048,
    exponent_step=0.15,
    exponent_tokens=256,
    population=16,
    generations=12,
    block_tokens=512,
    layer_step=0.03,
    layer_tokens=256,
)
SPARSITY = 0.5
EVALUATION_WINDOWS = 16
CALIBRATION_SEED, EVALUATION_SEED = 0, 1
PROMPT = "The old lighthouse keeper opened the door and"


def run_demo(out: str | Path | None = None) -> Path:
    """Make the demo model half sparse by every method, compare them, and let it write.

    Args:
        out: folder for the plans and the figures; None makes one under `runs/`.

    Returns:
        The folder: one plan per method, and `evaluation.json`.

    Raises:
        WisparseError: the folder exists already.
    """
    folder = Path(out) if out is not None else Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    if folder.exists():
        raise WisparseError(f"{folder}: exists already; nothing is overwritten")
    started = time.perf_counter()
    show = console()
    model, tokenizer = load("demo"), load_tokenizer("demo")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    show.print(f"demo model: {parameters / 1e6:.1f} million parameters, {model.config.num_blocks} blocks")

    show.print("the model writes its own calibration and evaluation text")
    window = SETTINGS.window
    text = sample_windows(model, SETTINGS.tokens // window, window, seed=CALIBRATION_SEED)
    held_out = sample_windows(model, EVALUATION_WINDOWS, window, seed=EVALUATION_SEED)

    dense_started = time.perf_counter()
    calibration = run_dense(model.config, model.params, text, SETTINGS, CALIBRATION_SEED)
    jax.block_until_ready(calibration.hidden)
    statistics_seconds = time.perf_counter() - dense_started
    record = {"text": "self", "tokens": int(text.size), "window": window}
    fingerprint = model_fingerprint(model)
    plans = {}
    # The dense run is shared: its time is counted once per method in the table, but spent once.
    for name in ("uniform", "teal", "wina", "wisparse"):
        show.print(f"{name}: {METHODS[name].summary}")
        plans[name] = search_plan(
            calibration, fingerprint, SPARSITY, name, CALIBRATION_SEED, SETTINGS, True, record, statistics_seconds
        )
        plans[name].save(folder / name)

    sparse = {name: apply(model, plan) for name, plan in plans.items()}
    evaluation = evaluate(model, held_out, sparse, progress=True)
    show.print(quality_table(evaluation, f"{SPARSITY:.0%} sparse, {evaluation.tokens} tokens of self-sampled text"))
    for name in ("teal", "wina", "uniform"):
        gap = evaluation.paired("wisparse", name)
        show.print(f"KL of wisparse minus {name}: {gap.mean:+.4f} ± {gap.error:.4f} (paired over windows)")
    show.print(timing_table({name: plan.timings for name, plan in plans.items()}))

    for label, writer in (("dense", model), (f"{SPARSITY:.0%} sparse, wisparse", sparse["wisparse"])):
        ids = tokenizer.encode(PROMPT)
        new = generate(writer, [ids], max_new_tokens=60, sampler=Sample(temperature=0.7, top_k=50), seed=0)[0]
        show.print(f"\n{label}:", style="bold")
        show.print(PROMPT + tokenizer.decode(new), markup=False, highlight=False)

    figures: dict[str, Any] = {name: evaluation.as_json(name) for name in plans}
    (folder / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    show.print(f"\nthe plan: {folder / 'wisparse'}   all figures: {folder / 'evaluation.json'}")
    show.print(f"{time.perf_counter() - started:.0f} s in all")
    return folder
