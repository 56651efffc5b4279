"""Checks of arguments that commands and functions share."""

import json

import jax
import numpy as np
import pytest

from wisparse_jax import arguments
from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation import Evaluation, Score
from wisparse_jax.inference.generate import check_request
from wisparse_jax.inference.sampling import Sample
from wisparse_jax.models.keys import random_key, row_keys, seed_words
from wisparse_jax.testing import tiny_config


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "1", True, None])
def test_one_rule_for_seeds(seed):
    with pytest.raises(WisparseError, match=r"seed = .*: expected a whole number from 0 to 9223372036854775807"):
        arguments.check_seed(seed)


def test_a_seed_may_be_numpys():
    assert type(arguments.check_seed(np.int64(3))) is int


def test_every_seed_has_a_key_of_its_own():
    seeds = (0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1)
    assert len({tuple(np.asarray(jax.random.key_data(random_key(seed))).tolist()) for seed in seeds}) == len(seeds)
    rows = jax.random.key_data(jax.jit(row_keys)(seed_words(list(seeds), len(seeds))))
    alone = [jax.random.key_data(jax.random.fold_in(random_key(seed), 0)) for seed in seeds]
    np.testing.assert_array_equal(rows, alone)
    rows = jax.random.key_data(jax.jit(row_keys)(seed_words(seeds[-1], 2)))
    alone = [jax.random.key_data(jax.random.fold_in(random_key(seeds[-1]), row)) for row in range(2)]
    np.testing.assert_array_equal(rows, alone)
    for seed in seeds[:2]:  # those that JAX tells apart are as JAX makes them
        assert (jax.random.key_data(random_key(seed)) == jax.random.key_data(jax.random.key(seed))).all()


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1.5, r" \(did you mean 0.015\?\)"),
        (50, r" \(did you mean 0.5\?\)"),
        (0, "$"),
        (-0.1, "$"),
        (100, r" \(did you mean 1\?\)"),
        (101, "$"),
        ("half", "$"),
    ],
)
def test_a_percentage_is_no_share(value, hint):
    with pytest.raises(WisparseError, match=f"x = .*: expected a share, above 0, at most 1{hint}"):
        arguments.check_share(value, "x")


def test_what_lies_on_a_bound_is_accepted():
    assert [arguments.check_count(least, "x", least) for least in (0, 1, 2)] == [0, 1, 2]
    with pytest.raises(WisparseError, match=r"x = 1: expected 2 or above, a whole number"):
        arguments.check_count(1, "x", 2)
    assert (arguments.check_share(1.0, "x"), arguments.check_share(0.0, "x", "0 or above")) == (1, 0)
    assert (arguments.check_seed(0), arguments.check_seed(2**63 - 1)) == (0, 2**63 - 1)
    assert [arguments.percent_hint(value) for value in (1, 1.5, 100, 100.5, True)] == [
        "",
        " (did you mean 0.015?)",
        " (did you mean 1?)",
        "",
        "",
    ]


SAMPLERS = {
    "temperature": ({"temperature": "hot"}, "temperature = 'hot'"),
    "infinite": ({"temperature": float("inf")}, "temperature = inf"),
    "half a token": ({"top_k": 2.5}, "top-k = 2.5: expected 1 or above, a whole number"),
    "a truth": ({"top_p": True}, "top-p = True: expected a share"),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_of_other_types_are_refused(name):
    values, message = SAMPLERS[name]
    cls = getattr(Sample, "__wrapped__", Sample)
    sampler = object.__new__(cls)
    for field, value in {"temperature": 1.0, "top_k": None, "top_p": 1.0, **values}.items():
        object.__setattr__(sampler, field, value)  # as Python takes them, without the tests' checks of types
    with pytest.raises(WisparseError, match=message):
        cls.__post_init__(sampler)


REQUESTS = {
    "text": ("two", 1, "prompts: expected lists of token ids, found text"),
    "a text in a list": (["two"], 1, "the prompt: expected token ids, found text"),
    "ids alone": ([1, 2], 1, "prompt 0: expected token ids, 1 dimension"),
    "a number": (3, 1, "prompts: expected lists of token ids, found int"),
    "broken numbers": ([[1.5]], 1, "the prompt: expected token ids, whole numbers, found float64"),
    "huge": ([[2**70]], 1, "the prompt: token id 1180591620717411303424 is outside the vocabulary of 97"),
    "half a token": ([[1]], 2.5, "max-new-tokens = 2.5: expected 0 or above, a whole number"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_that_are_no_ids_are_refused(name):
    prompts, new, message = REQUESTS[name]
    with pytest.raises(WisparseError, match=message):
        check_request(tiny_config(), prompts, new)


def test_arrays_and_lists_are_requests_alike():
    for prompts in ([[1, 2]], np.asarray([[1, 2]], np.int64), [np.asarray([1, 2])], ((1, 2),)):
        assert [row.tolist() for row in check_request(tiny_config(), prompts, 3)] == [[1, 2]]


def test_a_perplexity_beyond_all_numbers_is_infinite_and_null():
    dense = Score(np.asarray([800.0, 801.0]))
    assert dense.perplexity.mean == float("inf")
    out = Evaluation(dense, {}, 4, 8, 0.5).as_json()
    assert out["dense_perplexity"] is None and json.loads(json.dumps(out, allow_nan=False)) == out
