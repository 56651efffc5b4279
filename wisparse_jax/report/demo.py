"""`wisparse demo`: the whole method on the model that ships with the package."""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation import evaluate, rivals_of
from wisparse_jax.files import check_new_folder, expanded, new_folder
from wisparse_jax.inference import Sample, generate, sample_windows
from wisparse_jax.models.loading import load, load_tokenizer
from wisparse_jax.report.tables import console, paired_line, quality_table, share_table, timing_table
from wisparse_jax.search import METHODS, SearchSettings, calibrate
from wisparse_jax.search.cost import forecast
from wisparse_jax.search.methods import DEFAULT, PLANES
from wisparse_jax.sparsity import apply

SHOWN = ("uniform", "teal", "wisparse", "wisparse-plus", PLANES)
# Planned for two CPU cores: about two minutes of search in all.
SETTINGS = SearchSettings(
    tokens=10_240,
    held_out_share=0.2,  # four windows: fewer judge nothing
    statistics_tokens=2_048,
    compare_teal=False,  # TEAL has a row of its own
    absolute_steps=100,
    skipped_steps=250,
    heads_steps=75,
    gradient_tokens=6_144,
    training_steps=30,
    training_tokens=1_024,
    training_every=15,
    exponent_step=0.25,
    exponent_passes=2,
    exponent_tokens=256,
    population=16,
    generations=8,
    block_tokens=512,
    layer_step=0.0625,
    layer_tokens=256,
)
SPARSITY = 0.5
BITS = 3.0  # that weights in planes are read to, in place of a sparsity
EVALUATION_WINDOWS = 16
CALIBRATION_SEED, EVALUATION_SEED = 0, 1
PROMPT = "The old lighthouse keeper opened the door and"


def run_demo(out: str | Path | None = None) -> Path:
    """Make the demo model half sparse by every method, and of few bits by planes; compare them, and let it write.

    Args:
        out: folder for the plans and the figures; None makes one under `runs/`.

    Returns:
        The folder: one plan per method, and `evaluation.json`; it appears at the end, whole.

    Raises:
        WisparseError: the folder exists already, or cannot be written.
    """
    folder = expanded(out) if out is not None else Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    check_new_folder(folder, WisparseError)
    started = time.perf_counter()
    show = console()
    model, tokenizer = load("demo"), load_tokenizer("demo")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    show.print(f"demo model: {parameters / 1e6:.1f} million parameters, {model.config.num_blocks} blocks")

    sampled = SETTINGS.tokens + EVALUATION_WINDOWS * SETTINGS.window
    read = EVALUATION_WINDOWS * SETTINGS.window * (1 + len(SHOWN))
    if line := forecast(model, [METHODS[name] for name in SHOWN], SETTINGS, 1, sampled, read):
        print(line, file=sys.stderr, flush=True)
    show.print("the model writes its own calibration and evaluation text")
    window = SETTINGS.window
    text = sample_windows(model, SETTINGS.tokens // window, window, seed=CALIBRATION_SEED)
    held_out = sample_windows(model, EVALUATION_WINDOWS, window, seed=EVALUATION_SEED)

    plans = {}
    for name in SHOWN:
        show.print(f"{name}: {METHODS[name].summary}")
        bits = BITS if name == PLANES else None
        plans[name] = calibrate(
            model, text, SPARSITY, name, CALIBRATION_SEED, SETTINGS, progress=True, text="self", bits=bits
        )

    sparse = {name: apply(model, plan) for name, plan in plans.items()}
    evaluation = evaluate(model, held_out, sparse, progress=True, rivals=rivals_of(sparse))
    show.print(quality_table(evaluation, f"{SPARSITY:.0%} sparse, {evaluation.tokens} tokens of self-sampled text"))
    show.print(share_table(evaluation))
    stored = BITS / (1 - plans[PLANES].target)
    read = stored * (1 - evaluation.sparse[PLANES].sparsity.mean)
    show.print(
        f"{PLANES} reads {read:.2f} bits of a weight, scales counted; half of the channels are 8 bits a weight of "
        "bfloat16 and 4 of int8"
    )
    for one, other in ((PLANES, DEFAULT), (DEFAULT, "wisparse"), (DEFAULT, "teal"), ("wisparse", "teal")):
        show.print(paired_line(evaluation, one, other), highlight=False)
    show.print(timing_table({name: plan.timings for name, plan in plans.items()}))

    for label, writer in (("dense", model), (f"{SPARSITY:.0%} sparse, {DEFAULT}", sparse[DEFAULT])):
        ids = tokenizer.encode(PROMPT)
        new = generate(writer, [ids], max_new_tokens=60, sampler=Sample(temperature=0.7, top_k=50), seed=0)[0]
        show.print(f"\n{label}:", style="bold")
        show.print(PROMPT + tokenizer.decode(new), markup=False, highlight=False)

    figures: dict[str, Any] = {name: evaluation.as_json(name) for name in plans}
    with new_folder(folder, WisparseError) as made:
        for name, plan in plans.items():
            plan.save(made / name)
        (made / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    show.print(f"\nthe plan: {folder / DEFAULT}   all figures: {folder / 'evaluation.json'}")
    show.print(f"{time.perf_counter() - started:.0f} s in all")
    return folder
