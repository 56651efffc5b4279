"""An allocator of one's own, beside the library's: python examples/own_allocator.py

The lowest blocks feed all others, so this one keeps them denser: sparsity grows by a ramp over depth. It uses nothing
of what an allocator may ask; docs/adding-an-allocator.md lists that.
"""

from __future__ import annotations

import numpy as np

import wisparse_jax as ws
from wisparse_jax.inference import sample_windows
from wisparse_jax.models.config import LAYERS
from wisparse_jax.search import Allocation, BudgetProblem, Method, allocator
from wisparse_jax.search.methods import parts


@allocator("ramp")
def ramp(problem: BudgetProblem) -> Allocation:
    """Block sparsities from 0.1 below the target to 0.1 above it, all layers of a block alike."""
    depth = np.linspace(-0.1, 0.1, problem.blocks)
    budget = problem.within_budget(problem.target + depth[None])[0]  # the mean is the target, exactly
    return Allocation(np.repeat(budget[:, None], len(LAYERS), axis=1), {"from": budget[0], "to": budget[-1]})


def main() -> None:
    """Compare it with uniform sparsity and second-order budgets on the demo model."""
    settings = ws.SearchSettings(window=64, gradient_tokens=512, compare_teal=False)
    model = ws.load("demo", "float32")
    tokens = sample_windows(model, windows=16, length=settings.window, seed=0)
    plans = {}
    for name in ("uniform", "ramp", "second-order"):
        method = Method(name, f"activation magnitude, {name} budgets", parts(allocator=name))
        plans[name] = ws.calibrate(model, tokens, 0.5, method, settings=settings)
    text = sample_windows(model, windows=16, length=settings.window, seed=1)
    result = ws.evaluate(model, text, {name: ws.apply(model, plan) for name, plan in plans.items()})
    for name, score in result.sparse.items():
        kl = score.kl
        print(f"{name:13s} mean sparsity {plans[name].mean_sparsity:.6f}  KL {kl.mean:.4f} ± {kl.error:.4f}")


if __name__ == "__main__":
    main()
