"""Per-layer exponents by coordinate passes (WiSparse, arXiv 2602.14452, Alg. 2)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from wisparse_jax.calibration.statistics import BlockStatistics
from wisparse_jax.models.config import LAYERS
from wisparse_jax.search.losses import BlockObjective


def search_exponents(
    loss: BlockObjective,
    statistics: BlockStatistics,
    start: Float64[np.ndarray, "7"],
    sparsities: Float64[np.ndarray, "7"],
    candidates: tuple[float, ...],
    passes: int,
) -> tuple[Float64[np.ndarray, "7"], list[float]]:
    """The exponents of one block's layers that make its output error least at the given sparsities.

    Layer after layer takes its best candidate with the others as they are, until a pass changes nothing or `passes`
    are done. A layer's exponent changes only for a strictly smaller error, so the error never rises.

    Returns:
        The exponents, and the block's error at the start and after each pass.

    Raises:
        ValueError: a start that is not among the candidates.
    """
    if not np.isin(start, candidates).all():
        raise ValueError(f"start exponents {start.tolist()} are not all among the candidates")
    current = start.copy()
    thresholds = statistics.thresholds(current, sparsities)
    # A layer's threshold depends on its own exponent and sparsity alone, so one table serves all passes.
    table = np.array(
        [[statistics.threshold(n, a, float(p)) for a in candidates] for n, p in zip(LAYERS, sparsities, strict=True)]
    )
    errors: list[float] = []
    error = 0.0
    for _ in range(passes):
        changed = False
        for i in range(len(LAYERS)):
            alphas, tries = np.tile(current, (len(candidates), 1)), np.tile(thresholds, (len(candidates), 1))
            alphas[:, i], tries[:, i] = candidates, table[i]
            values = loss(alphas, tries)
            best, now = int(np.argmin(values)), candidates.index(current[i])
            best = best if values[best] < values[now] else now
            if not errors:
                errors.append(float(values[now]))
            changed |= best != now
            current, thresholds, error = alphas[best], tries[best], float(values[best])
        errors.append(error)
        if not changed:
            break
    return current, errors
