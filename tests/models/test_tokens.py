"""Token ids that a caller gives become int32 without a change, or are refused."""

from __future__ import annotations

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation import evaluate
from wisparse_jax.inference import generate
from wisparse_jax.models.model import Model
from wisparse_jax.models.tokens import token_row, token_rows

unchecked = inspect.unwrap(generate)  # the tests' own checks of types would be first


GOOD: dict[str, Any] = {
    "lists": [[1, 2], [3, 96]],
    "tuples": ((1, 2), (3, 96)),
    "int64": np.array([[1, 2], [3, 96]], np.int64),
    "uint8": np.array([[1, 2], [3, 96]], np.uint8),
    "jax": jnp.array([[1, 2], [3, 96]], jnp.int32),
}


@pytest.mark.parametrize("case", GOOD)
def test_rows_become_int32(case: str) -> None:
    found = token_rows(GOOD[case], 97)
    np.testing.assert_array_equal(found, [[1, 2], [3, 96]])
    assert found.dtype == np.int32
    np.testing.assert_array_equal(token_row(GOOD[case][0], 97), [1, 2])


def test_an_empty_row_is_one() -> None:
    assert token_row([], 97).shape == (0,)


BAD: dict[str, tuple[Any, str]] = {
    "text": ("Harbours", "x: expected rows of token ids, found text; a tokenizer's encode gives its ids"),
    "bytes": (b"Harbours", "x: expected rows of token ids, found text"),
    "texts": (["Harbours", "Seas"], "x: expected rows of token ids, found text"),
    "one dimension": (np.array([1, 2]), "x: expected rows of token ids, 2 dimension(s), found 1: shape (2,)"),
    "a number": (3, "x: expected rows of token ids, 2 dimension(s), found 0"),
    "three dimensions": ([[[1]]], "x: expected rows of token ids, 2 dimension(s), found 3: shape (1, 1, 1)"),
    "ragged": ([[1], [2, 3]], "x: expected rows of token ids of one length, found lists of different ones"),
    "floats": ([[1.0, 2.0]], "x: expected rows of token ids, whole numbers, found float64"),
    "booleans": ([[True, False]], "x: expected rows of token ids, whole numbers, found bool"),
    "nothing": ([[None]], "x: expected rows of token ids, whole numbers, found object"),
    "negative": ([[1, -1]], "x: token id -1 is outside the vocabulary of 97"),
    "beyond": ([[1, 97]], "x: token id 97 is outside the vocabulary of 97"),
    "wraps in int32": (np.array([[2**32 + 5]]), "x: token id 4294967301 is outside the vocabulary of 97"),
    "uint64": (np.array([[2**63 + 5]], np.uint64), "x: token id 9223372036854775813 is outside the vocabulary of 97"),
    "beyond 64 bits": ([[2**70]], "x: token id 1180591620717411303424 is outside the vocabulary of 97"),
}


@pytest.mark.parametrize("case", BAD)
def test_others_are_refused(case: str, tiny_model: Model) -> None:
    tokens, message = BAD[case]
    with pytest.raises(WisparseError, match=re.escape(message)):
        token_rows(tokens, 97, "x")
    if not isinstance(tokens, str | bytes | int) and np.ndim(np.asarray(tokens, object)) == 2:
        with pytest.raises(WisparseError, match=re.escape(message.replace("rows of token", "token").replace("x:", ""))):
            unchecked(tiny_model, tokens, 2)


def test_a_model_checks_what_it_reads(tiny_model: Model) -> None:
    with pytest.raises(WisparseError, match="tokens: token id 4294967296 is outside the vocabulary of 97"):
        tiny_model(np.array([[2**32]]))
    ids = np.array([[3, 5]])
    np.testing.assert_allclose(
        jax.jit(lambda t: tiny_model(t))(jnp.asarray(ids)), tiny_model(ids), rtol=1e-5, atol=1e-5
    )


def test_a_model_that_overflows_neither_writes_nor_is_scored(tiny_model: Model) -> None:
    broken = Model(tiny_model.config, tiny_model.params | {"norm": tiny_model.params["norm"] * jnp.inf})
    with pytest.raises(WisparseError, match="the logits are not finite"):
        generate(broken, [[3, 5]], 2)
    with pytest.raises(WisparseError, match="dense: the losses are not finite"):
        evaluate(broken, np.arange(24).reshape(2, 12), {})


def test_prompts_that_are_text_are_refused(tiny_model: Model) -> None:
    for prompts in ("Harbours", ["Harbours"], [["Harbours"]]):
        with pytest.raises(WisparseError, match=r"expected .*token ids, found text; a tokenizer"):
            unchecked(tiny_model, prompts, 2)
