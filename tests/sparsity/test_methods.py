"""What each method is made of, as README's table says; and that parts have names that settings know."""

import pytest

from wisparse_jax.calibration.settings import SWITCHES
from wisparse_jax.errors import WisparseError
from wisparse_jax.sparsity.methods import BASES, DEFAULT, GAINS, METHODS, get_method

MADE_OF = {  # basis, gains, exponent, whether it is searched, allocator, biases
    "wisparse-plus": ("refined", "trained", 1.0, False, "second-order", True),
    "wisparse": ("none", "norms", 0.0, True, "evolution", False),
    "wisparse-paper": ("none", "norms", 0.0, True, "paper", False),
    "teal": ("none", "norms", 0.0, False, "greedy", False),
    "wina": ("none", "norms", 1.0, False, "uniform", False),
    "uniform": ("none", "norms", 0.0, False, "uniform", False),
}


def test_what_each_method_is_made_of():
    found = {
        m.name: (m.basis, m.gains, m.exponent, m.search_exponents, m.allocator, m.biases) for m in METHODS.values()
    }
    assert found == MADE_OF and list(METHODS) == list(MADE_OF) and DEFAULT == "wisparse-plus"


def test_every_part_has_a_name_that_settings_know():
    assert (SWITCHES["basis"], SWITCHES["gains"]) == (BASES, GAINS)
    assert {method.allocator for method in METHODS.values()} <= set(SWITCHES["allocator"])


def test_an_unknown_method_is_refused():
    assert get_method("teal") is METHODS["teal"]
    with pytest.raises(WisparseError, match="method = 'magic': expected one of wisparse-plus, wisparse, wisparse-pap"):
        get_method("magic")
