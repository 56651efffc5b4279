import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wisparse_jax.errors import WisparseError
from wisparse_jax.inference.sampling import GREEDY, Sample, choose, penalised

PROBABILITIES = np.array([0.4, 0.05, 0.25, 0.2, 0.1])


def draw(sampler, count=4000, seed=0):
    logits = jnp.tile(jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)), (count, 1))
    keys = jax.random.split(jax.random.key(seed), count)
    return np.bincount(np.asarray(choose(logits, sampler.values(5), keys)), minlength=5) / count


def renormalised(kept, power=1.0):
    weights = np.where(np.isin(np.arange(5), kept), PROBABILITIES**power, 0)
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (Sample(), renormalised(range(5))),
        (Sample(temperature=2.0), renormalised(range(5), 0.5)),
        (Sample(top_k=2), renormalised([0, 2])),
        (Sample(top_k=50), renormalised(range(5))),
        (Sample(top_p=0.6), renormalised([0, 2])),  # 0.4 + 0.25 crosses 0.6
        (Sample(top_p=0.66), renormalised([0, 2, 3])),
        (Sample(top_p=1e-6), renormalised([0])),  # one token always stays
        (Sample(top_k=3, top_p=0.7), renormalised([0, 2])),  # the nucleus is of what top-k left
        (Sample(min_p=0.4), renormalised([0, 2, 3])),  # 0.16 and above
        (Sample(min_p=0.6), renormalised([0, 2])),
        (Sample(min_p=1.0), renormalised([0])),  # the most likely token always stays
        (Sample(temperature=2.0, min_p=0.4), renormalised([0, 2, 3, 4], 0.5)),  # of the shares at the temperature
        (Sample(top_p=0.6, min_p=0.2), renormalised([0, 2])),
    ],
)
def test_frequencies_are_those_of_the_cut_softmax(sampler, expected):
    found = draw(sampler)
    assert (found[expected == 0] == 0).all()
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / 4000)


def test_greedy_takes_the_most_likely():
    np.testing.assert_array_equal(draw(GREEDY, 10), [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(draw(Sample(temperature=1e-4), 100), [1, 0, 0, 0, 0])


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e39},
        {"repetition_penalty": float("inf")},
        {"repetition_penalty": float("nan")},
    ],
)
def test_bad_values_are_refused(bad):
    name = next(iter(bad)).replace("_", "-")
    with pytest.raises(WisparseError, match=f"{name} = "):
        Sample(**bad)


def test_the_repetition_penalty_is_transformers():
    """Positive logits divided, negative ones multiplied, of what a row has seen; recorded with transformers 5.24."""
    logits = jnp.asarray([[2.0, -1.0, 0.5, 0.0], [2.0, -1.0, 0.5, 0.0]])
    seen = jnp.asarray([[True, True, False, True], [False, False, False, False]])
    values = Sample(repetition_penalty=1.25).values(4)
    np.testing.assert_allclose(penalised(logits, seen, values), [[1.6, -1.25, 0.5, 0.0], [2.0, -1.0, 0.5, 0.0]])
    np.testing.assert_array_equal(penalised(logits, seen, GREEDY.values(4)), logits)
