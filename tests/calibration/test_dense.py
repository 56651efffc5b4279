"""The dense run: what is kept of it, against the model's own hidden states."""

import jax
import numpy as np
import pytest

from wisparse_jax.calibration import run_dense
from wisparse_jax.models.config import INPUT_GROUPS
from wisparse_jax.models.forward import hidden_states, layout
from wisparse_jax.search import SearchSettings

FIRST = 36  # of the 48 positions a quarter is sparse


@pytest.fixture(scope="module")
def dense(tiny_model, tiny_tokens):
    """The final hidden states of whole windows, and |x| of every input group by block."""
    config, records = tiny_model.config, []
    where = layout(config, *tiny_tokens.shape)
    hidden, _ = hidden_states(config, tiny_model.params, tiny_tokens, where, records=records)
    groups = [{g: np.abs(np.asarray(record[names[0]])) for g, names in INPUT_GROUPS.items()} for record in records]
    return np.asarray(hidden), groups


@pytest.mark.parametrize("tokens", [1_000, 20])
def test_statistics_are_of_sparse_positions_alone(tiny_model, tiny_tokens, dense, tokens):
    """In the order of the windows; as many of them as the settings say, the same of every layer."""
    settings = SearchSettings(sparse_share=0.25, statistics_tokens=tokens)
    calibration = run_dense(tiny_model, tiny_tokens, settings, seed=3)
    assert calibration.dense_positions == FIRST
    places = []
    for b, (statistics, groups) in enumerate(zip(calibration.statistics, dense[1], strict=True)):
        for group, found in statistics.samples.items():
            rows = groups[group][:, FIRST:].reshape(-1, groups[group].shape[-1])
            distances = np.abs(np.asarray(found)[:, None] - rows).max(axis=2)
            assert distances.min(axis=1).max() < 1e-5 * rows.max()
            if b:  # in the first block a token that comes again reads the same
                places.append(distances.argmin(axis=1).tolist())
    assert all(own == places[0] for own in places)
    assert len(places[0]) == len(set(places[0])) == min(tokens, 4 * 12) and places[0] == sorted(places[0])


def test_what_the_objectives_are_measured_on_is_sparse_too(tiny_model, tiny_tokens, dense):
    calibration = run_dense(tiny_model, tiny_tokens, SearchSettings(sparse_share=0.25))
    np.testing.assert_array_equal(calibration.tokens, np.asarray(tiny_tokens)[:, FIRST:])
    np.testing.assert_allclose(calibration.hidden, dense[0][:, FIRST:], atol=1e-5)
    embedded = np.asarray(tiny_model.params["embed"])[np.asarray(tiny_tokens)]
    np.testing.assert_array_equal(calibration.inputs[0], embedded[:, FIRST:])
    assert len(calibration.inputs) == tiny_model.config.num_blocks + 1
    assert calibration.record["sparse_positions"] == 4 * 12 and calibration.record["tokens"] == 4 * 48


def test_another_seed_samples_other_positions(tiny_model, tiny_tokens):
    settings = SearchSettings(statistics_tokens=20)
    one, other = (run_dense(tiny_model, tiny_tokens, settings, seed=seed).statistics[0].samples for seed in (0, 1))
    assert any((np.asarray(one[group]) != np.asarray(other[group])).any() for group in one)
    jax.tree.map(np.testing.assert_array_equal, one, run_dense(tiny_model, tiny_tokens, settings).statistics[0].samples)
