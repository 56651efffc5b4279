"""Evaluations as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from wisparse_jax.evaluation import Evaluation, SparseScore
from wisparse_jax.models.config import LAYERS
from wisparse_jax.search.stages import STAGES
from wisparse_jax.sparsity import SparsityPlan

# Of the time table; stages of a user's own stand below these.
ROWS = tuple(dict.fromkeys(row for stage in STAGES for row in stage.rows))


def console() -> Console:
    """Standard output, where names are shown as they are; wide enough for the tables where it is not a terminal."""
    plain: dict[str, Any] = {"markup": False, "emoji": False}  # a file may be called [bold] or :smile:
    width = None if Console().is_terminal else 120
    return Console(width=width, **plain)


def quality_table(evaluation: Evaluation, title: str) -> Table:
    """Perplexity, KL and realised sparsity of the dense model and of each plan, with standard errors."""
    # Within 80 columns for methods' names and figures of usual length; a longer name, of a plan, goes on below.
    table = Table(title=title)
    table.add_column("method", overflow="fold")
    for column in ("perplexity", "KL,\nnats/token", "realised\nsparsity", "spread\nover\ntokens"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("dense", f"{evaluation.dense.perplexity:.2f}", "0", "0", "-")
    for name, score in evaluation.sparse.items():
        table.add_row(name, *_cells(score))
    return table


def share_table(evaluation: Evaluation) -> Table:
    """KL of plans as they are and at the share that their rivals skip on the text, and what part of these's it is."""
    table = Table(title="at equal shares: thresholds times a factor")
    for column in ("method", "rival"):
        table.add_column(column, overflow="fold")
    for column in ("KL as it is,\nnats/token", "at the share\nof the rival", "share", "of its\nKL"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, rival in evaluation.rivals.items():
        at = evaluation.matched[name]
        figures = f"{evaluation.sparse[name].kl:.4f}", f"{at.kl:.4f}", f"{at.sparsity.mean:.4f}"
        table.add_row(name, rival, *figures, f"{evaluation.ratio(name):.3f}")
    return table


def paired_line(evaluation: Evaluation, one: str, other: str) -> str:
    """The difference of two plans' KL, and the share of channels that it is at where they have a rival in common."""
    rival = evaluation.common_rival(one, other)
    share = "" if rival is None else f", at the share that {rival} skips"
    return f"KL of {one} minus {other}: {evaluation.paired(one, other):+.4f} (paired over windows{share})"


def layer_table(score: SparseScore) -> Table:
    """Realised sparsity of every layer."""
    table = Table(title="realised sparsity by layer")
    for column in ("block", *LAYERS):
        table.add_column(column, justify="right")
    for block, row in enumerate(score.layer_sparsity):
        table.add_row(str(block), *(f"{value:.3f}" for value in row))
    return table


def plan_table(plan: SparsityPlan) -> Table:
    """What a plan costs on its held-out windows, beside the plans that it was compared with and the dense model."""
    held = plan.held_out
    table = Table(title=f"{plan.method}, {plan.target:.0%} sparse, on {held.get('windows')} held-out windows")
    for column in ("", "perplexity", "KL, nats/token", "realised sparsity"):
        table.add_column(column, justify="left" if column == "" else "right")
    table.add_row("dense", f"{held['dense_perplexity']:.2f}" if held.get("dense_perplexity") else "-", "0", "0")
    for name, *figures in plan.held_out_rows():
        table.add_row("this plan" if name == "plan" else name, *figures)
    return table


def budget_table(plan: SparsityPlan) -> Table:
    """Mean sparsity, realised sparsity and exponent of each of a block's layers, over the blocks."""
    table = Table(title="by layer, mean over blocks")
    for column in ("", *LAYERS, "all"):
        table.add_column(column, justify="left" if column == "" else "right")
    rows = [("sparsity", plan.sparsities, plan.mean_sparsity)]
    if plan.realised is not None:
        rows.append(("realised", plan.realised, plan.mean_realised))
    for name, values, mean in rows:
        table.add_row(name, *(f"{value:.3f}" for value in values.mean(axis=0)), f"{mean:.4f}")
    table.add_row("exponent", *(f"{value:.3g}" for value in plan.exponents.mean(axis=0)), "")
    return table


def timing_table(timings: Mapping[str, Mapping[str, float]]) -> Table:
    """Seconds that each stage of each method took, a column a method: there are fewer of these than of stages."""
    table = Table(title="seconds per stage")
    table.add_column("", no_wrap=True)
    for name in timings:
        table.add_column(name, justify="right", no_wrap=True)
    entered = [stage for stages in timings.values() for stage in stages]
    for stage in dict.fromkeys([row for row in ROWS if row in entered] + entered):
        cells = [f"{stages[stage]:.1f}" if stage in stages else "-" for stages in timings.values()]
        table.add_row(stage, *cells)
    table.add_row("in all", *(f"{sum(stages.values()):.1f}" for stages in timings.values()))
    return table


def _cells(score: SparseScore) -> list[str]:
    return [
        f"{score.perplexity:.2f}",
        f"{score.kl:.4f}",
        f"{score.sparsity:.4f}",
        f"{score.token_sparsity.std():.4f}",
    ]
