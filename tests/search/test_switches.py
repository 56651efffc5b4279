"""A method whose parts are switched is not called by its name alone, in plans and so in every table."""

import pytest

from wisparse_jax.search import METHODS, SearchSettings, calibrate
from wisparse_jax.search.methods import resolve


@pytest.mark.parametrize(
    ("method", "switches", "name"),
    [
        ("uniform", {"allocator": "greedy"}, "uniform (allocator greedy)"),
        ("uniform", {"allocator": "uniform", "biases": "off"}, "uniform"),
        ("wisparse", {"search_exponents": False}, "wisparse (search exponents off)"),
        ("teal", {"search_exponents": False}, "teal"),
        ("teal", {"gains": "gradients", "biases": "on"}, "teal (gains gradients, biases on)"),
    ],
)
def test_what_is_switched_is_named(method, switches, name):
    assert resolve(method, SearchSettings(**switches)).name == name
    assert METHODS[method].name == method


def test_a_plan_says_it(tiny_model, tiny_tokens):
    settings = SearchSettings(statistics_tokens=64, layer_step=0.2, compare_teal=False, allocator="greedy")
    assert calibrate(tiny_model, tiny_tokens, 0.5, "uniform", settings=settings).method == "uniform (allocator greedy)"
