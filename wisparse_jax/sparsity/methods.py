"""The methods: each is a choice of exponent and of the searches that run, through one code path."""

from __future__ import annotations

import dataclasses

from wisparse_jax.errors import WisparseError


@dataclasses.dataclass(frozen=True)
class Method:
    """`exponent` is every layer's alpha, or where the exponent search starts when there is one."""

    name: str
    exponent: float
    search_exponents: bool = False
    search_blocks: bool = False
    search_layers: bool = False
    summary: str = ""


METHODS = {
    method.name: method
    for method in (
        Method("wisparse", 0.0, True, True, True, "searched exponents, block budgets and layer budgets"),
        Method("teal", 0.0, search_layers=True, summary="activation magnitude, greedy layer budgets"),
        Method("wina", 1.0, summary="activation times weight norm, the same sparsity everywhere"),
        Method("uniform", 0.0, summary="activation magnitude, the same sparsity everywhere"),
    )
}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        WisparseError: no such method.
    """
    if name not in METHODS:
        raise WisparseError(f"method = {name!r}: expected one of {', '.join(METHODS)}")
    return METHODS[name]
