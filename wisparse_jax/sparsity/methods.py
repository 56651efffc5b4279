"""The methods: each is a choice of parts, through one code path."""

from __future__ import annotations

import dataclasses

from wisparse_jax.errors import WisparseError

BASES = ("none", "eigen", "refined")
GAINS = ("norms", "gradients", "trained")


@dataclasses.dataclass(frozen=True)
class Method:
    """What a plan is made of.

    `basis` is what the model is folded into, `gains` what counts a channel in the score (trained ones
    start from gradients), `exponent` every layer's alpha
    or where the exponent search starts, `allocator` how the budget is spread, `biases` whether constant vectors are
    trained in place of what is skipped.
    """

    name: str
    summary: str
    basis: str = "none"
    gains: str = "norms"
    exponent: float = 0.0
    search_exponents: bool = False
    allocator: str = "uniform"
    biases: bool = False


METHODS = {
    method.name: method
    for method in (
        Method(
            "wisparse-plus",
            "refined basis, second-order budgets over all layers, scores by gradients, trained then, and biases",
            basis="refined",
            gains="trained",
            exponent=1.0,
            allocator="second-order",
            biases=True,
        ),
        Method(
            "wisparse",
            "the paper's: searched exponents, evolved block budgets, each candidate with its layer budgets",
            search_exponents=True,
            allocator="evolution",
        ),
        Method(
            "wisparse-paper",
            "the paper to the letter: block budgets by 400 generations of integer moves, layers equal meanwhile",
            search_exponents=True,
            allocator="paper",
        ),
        Method("teal", "activation magnitude, greedy layer budgets in blocks of equal sparsity", allocator="greedy"),
        Method("wina", "activation times weight norm, the same sparsity everywhere", exponent=1.0),
        Method("uniform", "activation magnitude, the same sparsity everywhere"),
    )
}
DEFAULT = "wisparse-plus"


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        WisparseError: no such method.
    """
    if name not in METHODS:
        raise WisparseError(f"method = {name!r}: expected one of {', '.join(METHODS)}")
    return METHODS[name]
