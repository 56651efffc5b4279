"""What each method is made of, as the table of docs/method.md says; and that parts have names that settings know."""

import dataclasses

import pytest

from kernels_pallas.formats import FORMATS
from wisparse_jax.errors import WisparseError
from wisparse_jax.search import SearchSettings
from wisparse_jax.search.allocators import ALLOCATORS
from wisparse_jax.search.methods import DEFAULT, METHODS, PLANES, get_method, switches
from wisparse_jax.search.stages import (
    STAGES,
    Basis,
    Budgets,
    Exponents,
    FinalExponents,
    PlaneBudgets,
    Planes,
    Score,
    Training,
)
from wisparse_jax.search.stages.basis import BASES
from wisparse_jax.search.stages.score import GAINS

MADE_OF = {  # basis, gains, exponent, whether it is searched, allocator, biases
    "wisparse-plus": ("refined", "trained", 1.0, False, "second-order", True),
    "wisparse": ("none", "norms", 0.0, True, "evolution", False),
    "wisparse-paper": ("none", "norms", 0.0, True, "paper", False),
    "teal": ("none", "norms", 0.0, False, "greedy", False),
    "wina": ("none", "norms", 1.0, False, "greedy", False),
    "uniform": ("none", "norms", 0.0, False, "uniform", False),
}
IN_PLANES = {"planes": (Basis, Planes, PlaneBudgets), "grinqh": (Planes, PlaneBudgets)}


def test_what_each_method_is_made_of():
    found = {}
    for m in METHODS.values():
        if m.name in IN_PLANES:
            continue
        score, training = m.stage(Score), m.stage(Training)
        kinds = [type(stage) for stage in m.stages]
        searched = [kind for kind in kinds if issubclass(kind, Exponents)]
        assert searched == [Exponents, FinalExponents] * score.start
        assert kinds == [kind for kind in STAGES if kind in kinds]  # in the one order
        assert training.gains == (score.gains == "trained")
        found[m.name] = (
            m.stage(Basis).kind, score.gains, score.exponent, score.start, m.stage(Budgets).allocator.name,
            training.biases,
        )  # fmt: skip
    assert found == MADE_OF and DEFAULT == "wisparse-plus"
    first, *others = MADE_OF
    assert list(METHODS) == [first, *IN_PLANES, *others]


def test_methods_for_planes():
    """Of one weight format each, with a basis refined for it where there is one."""
    for name, stages in IN_PLANES.items():
        found = METHODS[name].stages
        assert (
            tuple(type(stage) for stage in found) == stages
            and len(FORMATS[METHODS[name].stage(Planes).format].planes) > 1
        )
    basis, planes = METHODS[PLANES].stage(Basis), METHODS[PLANES].stage(Planes)
    assert (basis.kind, basis.planes) == ("refined", planes.format) and not planes.magnitudes
    assert METHODS["grinqh"].stage(Planes).magnitudes


def test_every_part_has_a_name_that_settings_know():
    choices = {field.name: field.metadata["choices"] for field in dataclasses.fields(SearchSettings)}
    expected = {"basis": BASES, "gains": GAINS, "allocator": tuple(ALLOCATORS), "biases": ("on", "off")}
    assert set(switches()) == set(expected)
    assert {name: tuple(choices[name]()) for name in expected} == {
        name: ("method", *known) for name, known in expected.items()
    }


def test_an_unknown_method_is_refused():
    assert get_method("teal") is METHODS["teal"]
    with pytest.raises(WisparseError, match="method = 'magic': expected one of wisparse-plus, planes, grinqh, wisp"):
        get_method("magic")
