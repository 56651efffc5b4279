"""What a comparison compares: methods, and methods with parts switched by the search's settings."""

from __future__ import annotations

import dataclasses

from wisparse_jax.errors import WisparseError
from wisparse_jax.search.allocators import ALLOCATORS
from wisparse_jax.sparsity import METHODS


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method with some of its parts switched; `group` is what it is drawn with."""

    name: str
    method: str
    switches: dict[str, str] = dataclasses.field(default_factory=dict)
    group: str = "method"


def _group(group: str, rows: list[tuple[str, str, dict[str, str]]]) -> list[Variant]:
    return [Variant(f"{group}: {name}", method, switches, group) for name, method, switches in rows]


ABLATIONS = [
    *_group(
        "paper's order",
        [
            ("uniform", "uniform", {}),
            ("+ exponents", "wisparse", {"allocator": "uniform"}),
            ("+ block budgets", "wisparse", {"allocator": "evolution-equal-layers"}),
            ("+ layer budgets", "wisparse", {}),
        ],
    ),
    *_group(
        "alone",
        [
            ("eigenvector basis", "uniform", {"basis": "eigen"}),
            ("refined basis", "uniform", {"basis": "refined"}),
            ("gradient scores", "wina", {"gains": "gradients"}),
            ("second-order budgets", "uniform", {"allocator": "second-order"}),
            ("biases", "uniform", {"biases": "on"}),
        ],
    ),
    *_group(
        "together",
        [
            ("refined basis", "uniform", {"basis": "refined"}),
            ("+ gradient scores", "wina", {"basis": "refined", "gains": "gradients"}),
            ("+ second-order budgets", "wisparse-plus", {"gains": "gradients", "biases": "off"}),
            ("+ trained scores", "wisparse-plus", {"biases": "off"}),
            ("+ biases", "wisparse-plus", {}),
        ],
    ),
    *_group(
        "left out",
        [
            ("basis", "wisparse-plus", {"basis": "none"}),
            ("refinement", "wisparse-plus", {"basis": "eigen"}),
            ("trained scores", "wisparse-plus", {"gains": "gradients"}),
            ("gradient scores", "wisparse-plus", {"gains": "norms"}),
            ("second-order budgets", "wisparse-plus", {"allocator": "uniform"}),
            ("biases", "wisparse-plus", {"biases": "off"}),
        ],
    ),
]
GROUPS = tuple(dict.fromkeys(row.group for row in ABLATIONS))


def variants_of(
    methods: tuple[str, ...], ablations: tuple[str, ...], allocators: tuple[str, ...], allocators_with: str
) -> list[Variant]:
    """The variants that a comparison was asked for.

    Raises:
        WisparseError: an unknown method, group of ablations or allocator, or one named twice.
    """
    for kind, names, known in (
        ("methods", methods, METHODS), ("ablations", ablations, GROUPS), ("allocators", allocators, ALLOCATORS),
        ("allocators-with", (allocators_with,), METHODS),
    ):  # fmt: skip
        if unknown := [name for name in names if name not in known]:
            raise WisparseError(f"{kind}: {unknown[0]!r}: expected some of {', '.join(map(repr, known))}")
        if len(set(names)) < len(names):
            raise WisparseError(f"{kind}: expected none twice, found {', '.join(map(repr, names))}")
    if not (methods or ablations or allocators):
        raise WisparseError("methods, ablations and allocators: expected one at least, found none")
    found = [Variant(name, name) for name in methods] + [row for row in ABLATIONS if row.group in ablations]
    switches = {"biases": "off"}
    if METHODS[allocators_with].gains == "trained":
        switches["gains"] = "gradients"  # what is trained would stand for the budgets
    return found + _group(
        f"allocator on {allocators_with}",
        [(name, allocators_with, switches | {"allocator": name}) for name in allocators],
    )
