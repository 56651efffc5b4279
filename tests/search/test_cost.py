"""What a search will cost: the arithmetic of docs/method.md."""

import numpy as np
import pytest

from wisparse_jax.calibration import SearchSettings
from wisparse_jax.models.config import read_config
from wisparse_jax.search.cost import search_tokens, seconds_per_token
from wisparse_jax.search.progress import stages
from wisparse_jax.sparsity import METHODS


@pytest.fixture(scope="module")
def config(repository):
    return read_config(repository / "configs" / "llama-3.1-8b.json")


def test_the_parts_are_those_of_the_documentation(config):
    plus = search_tokens(config, METHODS["wisparse-plus"], SearchSettings())
    assert plus["gains"] == plus["budgets"] == 3 * 16_384 and plus["moments"] == 16_384 + 3 * 16_384
    assert plus["training"] == 3 * 2_048 * 300 + 300 / 25 * 4 * 512  # of 32 windows four are held out
    paths = search_tokens(config, METHODS["teal"], SearchSettings())["budgets"]
    assert paths / (7 * 2_048) == pytest.approx(190, abs=10)  # steps
    assert search_tokens(config, METHODS["wisparse"], SearchSettings())["budgets"] == paths + 32 * 61 * 4_096
    assert search_tokens(config, METHODS["wisparse-paper"], SearchSettings())["budgets"] == paths + 64 * 400 * 4_096


def test_teals_row_is_counted_where_it_is_searched_for_alone(config):
    on, off = SearchSettings(), SearchSettings(compare_teal=False)
    for name, alone in (("uniform", True), ("wisparse-plus", True), ("teal", False)):
        with_teal, without = (search_tokens(config, METHODS[name], settings)["comparison"] for settings in (on, off))
        assert (with_teal > without) == alone, name


def test_every_stage_of_a_search_is_counted(config):
    for name, method in METHODS.items():
        assert set(search_tokens(config, method, SearchSettings())) == set(stages(method, True, 1)), name


def test_the_time_of_a_token_is_measured(tiny_model):
    assert 0 < seconds_per_token(tiny_model) < 1 and np.isfinite(seconds_per_token(tiny_model))
