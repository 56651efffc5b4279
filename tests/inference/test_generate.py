import dataclasses
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from wisparse_jax.errors import WisparseError
from wisparse_jax.inference import Sample, generate
from wisparse_jax.inference.generate import token_stream
from wisparse_jax.models.forward import empty_cache, head, hidden_states, layout
from wisparse_jax.models.model import Model
from wisparse_jax.search import SearchSettings, calibrate
from wisparse_jax.sparsity import apply
from wisparse_jax.testing import count_compilations, tiny_config, tiny_model

PROMPTS = [[5, 9, 2, 40, 11], [3], [7, 7, 7, 60, 61, 62, 63, 8, 9]]
VARIANTS = {
    "plain": {},
    "window": {"windows": (4, None, 4)},
    "qk-norm": {"qk_norm": True, "qkv_bias": True},
    "tied": {"tied_embeddings": True},
}


def endless(**changes):
    """A model without end-of-sequence tokens."""
    return tiny_model(tiny_config(eos_token_ids=(), **changes))


@pytest.fixture(scope="module")
def model():
    return endless()


@pytest.fixture(scope="module")
def sparse(model, tiny_tokens):
    return apply(model, calibrate(model, tiny_tokens, 0.5, "wina", settings=SearchSettings(compare_teal=False)))


def greedy_by_whole_sequences(model, prompt, count, penalty=1.0):
    ids = list(prompt)
    for _ in range(count):
        padded = jnp.asarray([ids + [0] * (40 - len(ids))])
        logits = np.array(model(padded)[0, len(ids) - 1])
        seen = sorted(set(ids))
        logits[seen] = np.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
        ids.append(int(np.argmax(logits)))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_decoding_is_that_of_whole_sequences(name):
    model = endless(**VARIANTS[name])
    for row, prompt in zip(generate(model, PROMPTS, 20), PROMPTS, strict=True):
        assert row == greedy_by_whole_sequences(model, prompt, 20)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_the_repetition_penalty_is_of_the_prompt_and_of_the_answer(model, penalty):
    """Rows of several lengths: what pads a prompt is not among what it has seen."""
    found = generate(model, PROMPTS, 20, Sample(0.0, repetition_penalty=penalty))
    assert found == [greedy_by_whole_sequences(model, prompt, 20, penalty) for prompt in PROMPTS]
    assert found != generate(model, PROMPTS, 20)


def test_every_path_draws_the_same_tokens(model):
    sampler = Sample(1.5, min_p=0.02, repetition_penalty=1.2)
    [whole] = generate(model, PROMPTS[:1], 20, sampler, seed=7)
    for every in (1, 3, None):
        pieces = token_stream(model, PROMPTS[:1], 20, sampler, 7, every=every)
        assert [token for piece in pieces for token in piece[0]] == whole
    [watched] = generate(model, PROMPTS[:1], 20, sampler, seed=7, on_tokens=lambda _: None)
    assert watched == whole != generate(model, PROMPTS[:1], 20, Sample(1.5), seed=7)[0]


def test_rows_may_have_seeds_of_their_own(model):
    """Each is what the prompt alone with that seed gives, wherever it stands; one seed for all is unlike that."""
    sampler, seeds = Sample(1.5), [2**62 + 1, 3, 1]
    alone = [generate(model, [prompt], 12, sampler, seed=seed)[0] for prompt, seed in zip(PROMPTS, seeds, strict=True)]
    assert generate(model, PROMPTS, 12, sampler, seed=seeds) == alone
    assert generate(model, PROMPTS[::-1], 12, sampler, seed=seeds[::-1]) == alone[::-1]
    copies = generate(model, PROMPTS[:1] * 3, 12, sampler, seed=[5, 5, 6])
    assert copies[0] == copies[1] != copies[2]
    with pytest.raises(WisparseError, match="seed: expected one for all, or one for each of 3 prompts, found 2"):
        generate(model, PROMPTS, 12, sampler, seed=seeds[:2])
    with pytest.raises(WisparseError, match="seed = -1: expected a whole number"):
        generate(model, PROMPTS, 12, sampler, seed=[1, 2, -1])


def test_a_row_does_not_depend_on_its_neighbours(model):
    sampler = Sample(1.3)
    together = generate(model, PROMPTS, 12, sampler, seed=4)
    first = generate(model, PROMPTS[:1], 12, sampler, seed=4)
    assert together[0] == first[0] and together[0] != together[1]


def test_a_sparse_model_reads_the_prompt_densely_and_writes_sparsely(sparse):
    """Against an explicit loop: dense cache for the prompt, thresholds for every token after it."""
    config, params, prompt = sparse.config, sparse.params, PROMPTS[0]
    cache = empty_cache(config, 1, 32, jnp.float32)
    hidden, cache = hidden_states(config, params, jnp.asarray([prompt]), layout(config, 1, len(prompt)), cache)
    expected = []
    for step in range(10):
        expected.append(int(jnp.argmax(head(params, hidden[:, -1]))))
        where = layout(config, 1, 1, len(prompt) + step)
        hidden, cache = hidden_states(config, params, jnp.asarray([expected[-1:]]), where, cache, sparse.rules)
    assert generate(sparse, [prompt], 10, hold=False) == [expected]
    assert generate(sparse.dense, [prompt], 10) != [expected]


def test_another_prompt_of_the_bucket_compiles_nothing(model):
    generate(model, PROMPTS, 20, Sample(0.8, 10, 0.9), seed=1)
    with count_compilations() as compilations:
        generate(model, [[4] * 20, [1, 2], [3], [8, 8]], 30, Sample(1.1, 5, 0.5), seed=2)
        generate(model, PROMPTS, 30, Sample(1.1, min_p=0.1, repetition_penalty=1.1), seed=[1, 2, 2**40])
    assert compilations.count == 0


@pytest.mark.parametrize("name", ["plain", "window"])
def test_a_prompt_with_room_to_grow_is_answered_alike_and_compiles_nothing_when_it_grows(name, monkeypatch):
    """In parts of 8, of which 17 tokens need three and the first is padding in part; in a batch, too."""
    monkeypatch.setattr(sys.modules["wisparse_jax.inference.generate"], "SMALLEST_PART", 8)
    model = endless(context=96, **VARIANTS[name])
    drawn = np.random.default_rng(0).integers(3, 90, 60).tolist()
    prompts = [[drawn[:17]], [drawn[:3]], [drawn[:60]], [drawn[:8]]]

    def answers(prompts, **how):
        return [row for piece in token_stream(model, prompts, 20, every=None, **how) for row in piece]

    expected = [answers(prompt) for prompt in prompts]
    first = answers(prompts[0], grows_to=60)
    with count_compilations() as compilations:
        later = [answers(prompt, grows_to=60) for prompt in prompts[1:]]
    assert compilations.count == 0
    assert [first, *later] == expected
    several = [drawn[:17], drawn[:3], drawn[:60]]
    assert answers(several, grows_to=60) == answers(several)


def test_a_row_ends_at_tokens_that_the_caller_names(model):
    text = generate(model, PROMPTS[:1], 20)[0]
    stop = next(token for token in text[5:] if token not in text[:5])
    found = [token for piece in token_stream(model, PROMPTS[:1], 20, ends=(stop, 96)) for token in piece[0]]
    assert found == text[: text.index(stop)]


def test_same_seed_same_text_and_another_seed_another(model):
    runs = [generate(model, [[5]], 30, Sample(1.5), seed=seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


def test_it_stops_at_the_end_of_sequence(model):
    text = generate(model, PROMPTS[:1], 20)[0]
    stop = text[6]
    ended = Model(dataclasses.replace(model.config, eos_token_ids=(stop, 96)), model.params)
    assert generate(ended, PROMPTS[:1], 20)[0] == text[: text.index(stop)]
    rows = generate(ended, PROMPTS, 20)  # rows that end early wait for the others
    assert rows[0] == text[: text.index(stop)] and all(stop not in row for row in rows)


def test_streamed_tokens_are_the_result(model):
    pieces = []
    result = generate(model, PROMPTS, 21, on_tokens=pieces.append)
    assert [[token for piece in pieces for token in piece[b]] for b in range(3)] == result
    assert len(pieces) > 2 and result == generate(model, PROMPTS, 21)


def test_borders(model):
    assert generate(model, [], 5) == []
    assert generate(model, PROMPTS, 0) == [[], [], []]
    assert generate(model, [[]], 8) == generate(model, [[model.config.bos_token_ids[0]]], 8)
    assert len(generate(model, [[1] * 60], 4)[0]) == 4  # up to the last position of the context


BAD = {
    "too long": ([[1], [1] * 60], 5, "prompt 1 has 60 tokens; with 5 new ones"),
    "negative": ([[1]], -1, "max-new-tokens = -1"),
    "vocabulary": ([[1, 97]], 1, "token id 97 is outside the vocabulary of 97"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_refused(model, name):
    prompts, new, message = BAD[name]
    with pytest.raises(WisparseError, match=message):
        generate(model, prompts, new)


def test_an_empty_prompt_needs_a_bos():
    with pytest.raises(WisparseError, match="the prompt is empty"):
        generate(endless(bos_token_ids=()), [[]], 3)
