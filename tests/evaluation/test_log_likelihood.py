"""Scores of continuations against the model run token by token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation.log_likelihood import Request, score_continuations
from wisparse_jax.evaluation.windows import DENSE_FIRST
from wisparse_jax.models.forward import empty_cache, token_logits
from wisparse_jax.search import SearchSettings, calibrate
from wisparse_jax.sparsity import apply
from wisparse_jax.testing import count_compilations

# Context and continuation lengths: one token each, either longer, more than the context of 64 in all, all of it.
LENGTHS = [(1, 1), (7, 2), (8, 8), (20, 3), (60, 12), (90, 5), (1, 64)]


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(0)
    return [Request(rng.integers(0, 97, a).tolist(), rng.integers(0, 97, b).tolist()) for a, b in LENGTHS]


@pytest.fixture(scope="module")
def sparse(tiny_model, tiny_tokens):
    return apply(
        tiny_model, calibrate(tiny_model, tiny_tokens, 0.5, "uniform", settings=SearchSettings(compare_teal=False))
    )


def token_by_token(model, request, share):
    """The last `share` of the context's tokens sparse, and all that follow."""
    config, rules = model.config, model.rules
    tokens = [*request.context, *request.continuation][-65:]
    prompt = len(tokens) - len(request.continuation)
    dense = max(prompt - round(prompt * share), min(prompt, DENSE_FIRST))
    cache, total, greedy = empty_cache(config, 1, 64, jnp.float32), 0.0, True
    step = jax.jit(token_logits, static_argnums=0)
    for at, token in enumerate(tokens[:-1]):
        used = None if at < dense else rules
        logits, cache = step(config, model.params, jnp.array([token]), jnp.int32(at), jnp.array([0]), cache, used)
        if at + 1 >= prompt:
            total += float(jax.nn.log_softmax(logits[0])[tokens[at + 1]])
            greedy &= int(logits[0].argmax()) == tokens[at + 1]
    return total, greedy


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_scores_are_those_of_the_model_token_by_token(sparse, requests, share):
    found = score_continuations(sparse, requests, share)
    expected = [token_by_token(sparse, request, share) for request in requests]
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], rtol=1e-4, atol=1e-4)
    assert [f[1] for f in found] == [e[1] for e in expected]


def test_a_dense_model_scores_alike_whatever_the_share(tiny_model, sparse, requests):
    expected = [token_by_token(tiny_model, request, 1.0)[0] for request in requests]
    for share in (0.0, 1.0):
        found = [f[0] for f in score_continuations(tiny_model, requests, share)]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    differ = np.abs(np.subtract(expected, [f[0] for f in score_continuations(sparse, requests, 0.5)]))
    # A context of one token has no half to be sparse.
    assert [bool(d > 1e-3) for d in differ] == [False, True, True, True, True, True, True]


def test_greedy_continuations_are_recognised(tiny_model, requests):
    context = list(requests[3].context)
    best = int(tiny_model(jnp.array([context]))[0, -1].argmax())
    other = [(best + 1) % 97]
    pair = [Request(context, [best]), Request(context, other)]
    assert [greedy for _, greedy in score_continuations(tiny_model, pair)] == [True, False]


def test_batches_change_nothing_and_other_requests_compile_nothing(sparse, requests):
    whole = score_continuations(sparse, requests * 3)
    np.testing.assert_allclose(
        whole, score_continuations(sparse, requests, tokens_at_once=16) * 3, rtol=1e-4, atol=1e-4
    )
    others = [Request(context[::-1], rest[::-1]) for context, rest in requests] * 3
    with count_compilations() as compiled:
        score_continuations(sparse, others)
    assert compiled.count == 0


@pytest.mark.parametrize(
    ("request_", "share", "message"),
    [
        (([], [1]), 0.5, "request 0: expected a context and a continuation of 1 to 64 tokens, found 0 and 1"),
        (([1], []), 0.5, "found 1 and 0 tokens"),
        (([1], [1] * 65), 0.5, "found 1 and 65 tokens"),
        (([97], [1]), 0.5, "request 0: token ids outside the vocabulary of 97"),
        (([1], [97]), 0.5, "request 0: token ids outside the vocabulary of 97"),
        (([1], [1]), 1.5, "sparse-prefill = 1.5"),
    ],
)
def test_bad_requests_are_refused(tiny_model, request_, share, message):
    with pytest.raises(WisparseError, match=message):
        score_continuations(tiny_model, [Request(*request_)], share)
