"""`wisparse show`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tyro.conf import Positional

if TYPE_CHECKING:
    from wisparse_jax.sparsity import SparsityPlan

SHOWN = 4  # blocks at either end


@dataclasses.dataclass(frozen=True)
class Show:
    """Show what a plan is, on one screen."""

    plan: Positional[str]
    """A plan folder, or a hub id."""

    def run(self) -> None:
        """Read the plan and print its tables."""
        from wisparse_jax.report.tables import budget_table, console, plan_table
        from wisparse_jax.sparsity import SparsityPlan

        plan = SparsityPlan.load(self.plan)
        show = console()
        for line in _lines(plan):
            show.print(line, highlight=False)
        show.print(budget_table(plan))
        if "plan" in plan.held_out:
            show.print(plan_table(plan))
        if plan.timings:
            stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in plan.timings.items())
            total = f"{sum(plan.timings.values()):.0f} s"
            show.print(f"time: {total} ({stages})", highlight=False)
        for note in plan.history.get("notes", []):
            show.print(f"note: {note}", highlight=False)


def _lines(plan: SparsityPlan) -> Iterator[str]:
    """What the plan is, in words, a line each."""
    import numpy as np

    maker = f"wisparse_jax {plan.version or 'of an unknown version'}, seed {plan.seed}"
    realised = f"realised {plan.mean_realised:.4f} on its calibration text"
    if plan.held_out.get("plan", {}).get("sparsity") is not None:
        realised += f", {plan.held_out['plan']['sparsity']:.4f} on the windows of it that were held out"
    yield f"{plan.method} plan: target {plan.target:.4f}, {realised}"
    record = plan.calibration
    model = f"{record['model']} ({plan.fingerprint[:16]})" if record.get("model") else plan.fingerprint[:16]
    yield f"for the model {model} of {len(plan.sparsities)} blocks; made by {maker}"
    if "tokens" in record:
        windows = f" in windows of {record['window']}" if "window" in record else ""
        yield f"calibrated on {record.get('text', 'unknown text')}: {record['tokens']:,} tokens{windows}"
    scores = (
        "gains of its own" if plan.gains is not None else "weight norms" if plan.exponents.any() else "magnitudes alone"
    )
    basis = "none" if plan.basis is None else f"of its own, {len(plan.basis.stream)} wide"
    biases = "none" if plan.biases is None else "one vector a layer"
    yield f"basis: {basis}; scores by {scores}; biases: {biases}"
    blocks = plan.block_sparsities
    if np.ptp(blocks) < 1e-6:
        yield "all blocks equally sparse"
        return
    order = [int(b) for b in blocks.argsort(kind="stable")]
    for title, chosen in (("least", order[:SHOWN]), ("most", order[: -SHOWN - 1 : -1])):
        yield f"{title} sparse blocks: " + ", ".join(f"{b} ({blocks[b]:.3f})" for b in chosen)
