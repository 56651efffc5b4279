import dataclasses

import jax.numpy as jnp
import pytest

from wisparse_jax.calibration import SearchSettings
from wisparse_jax.errors import WisparseError
from wisparse_jax.inference import Sample, generate
from wisparse_jax.models.forward import empty_cache, head, hidden_states, layout
from wisparse_jax.models.llama import Llama
from wisparse_jax.search import calibrate
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


def greedy_by_whole_sequences(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        padded = jnp.asarray([ids + [0] * (40 - len(ids))])
        ids.append(int(jnp.argmax(model(padded)[0, len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_decoding_is_that_of_whole_sequences(name):
    model = endless(**VARIANTS[name])
    for row, prompt in zip(generate(model, PROMPTS, 20), PROMPTS, strict=True):
        assert row == greedy_by_whole_sequences(model, prompt, 20)


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
    assert generate(sparse, [prompt], 10) == [expected]
    assert generate(sparse.model, [prompt], 10) != [expected]


def test_another_prompt_of_the_bucket_compiles_nothing(model):
    generate(model, PROMPTS, 20, Sample(0.8, 10, 0.9), seed=1)
    with count_compilations() as compilations:
        generate(model, [[4] * 20, [1, 2], [3], [8, 8]], 30, Sample(1.1, 5, 0.5), seed=2)
    assert compilations.count == 0


def test_same_seed_same_text_and_another_seed_another(model):
    runs = [generate(model, [[5]], 30, Sample(1.5), seed=seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


def test_it_stops_at_the_end_of_sequence(model):
    text = generate(model, PROMPTS[:1], 20)[0]
    stop = text[6]
    ended = Llama.from_params(dataclasses.replace(model.config, eos_token_ids=(stop, 96)), model.params)
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
