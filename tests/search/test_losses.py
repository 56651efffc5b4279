import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wisparse_jax.calibration import run_dense
from wisparse_jax.models.forward import layout
from wisparse_jax.models.kl import kl_divergence
from wisparse_jax.search.losses import BlockLoss, KLLoss
from wisparse_jax.sparsity.apply import threshold_rules
from wisparse_jax.testing.compilations import count_compilations


@pytest.fixture(scope="module")
def calibration(tiny_model, tiny_tokens):
    return run_dense(tiny_model, np.asarray(tiny_tokens))


@pytest.fixture
def candidates(calibration):
    """Exponents, and thresholds of five random budgets."""
    rng = np.random.default_rng(3)
    blocks = calibration.config.num_blocks
    alphas = rng.uniform(0, 1.5, (blocks, 7))
    budgets = rng.uniform(0.2, 0.8, (5, blocks, 7))
    thresholds = [s.thresholds(alphas[b], budgets[:, b]) for b, s in enumerate(calibration.statistics)]
    return alphas, np.stack(thresholds, axis=1)


def test_kl_of_equal_logits_is_zero_and_else_positive():
    a = jax.random.normal(jax.random.key(0), (4, 11))
    np.testing.assert_allclose(kl_divergence(a, a + 3.0), 0.0, atol=1e-6)
    assert (kl_divergence(a, -a) > 0).all()


def test_kl_matches_its_definition():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.5, 0.3])
    found = kl_divergence(jnp.log(jnp.asarray(p)), jnp.log(jnp.asarray(q)))
    np.testing.assert_allclose(found, np.sum(p * np.log(p / q)), rtol=1e-5)


def test_keeping_everything_costs_nothing(calibration):
    blocks = calibration.config.num_blocks
    zeros = np.zeros((2, blocks, 7))
    assert KLLoss(calibration, 10**6, 4)(zeros[0], zeros) == pytest.approx(0, abs=1e-6)
    assert BlockLoss(calibration, 0, 10**6, 4)(zeros[0, :1].repeat(3, 0), zeros[0, :1].repeat(3, 0)) == pytest.approx(
        0, abs=1e-9
    )


def test_candidates_that_share_their_attention_are_evaluated_as_one_by_one(calibration, candidates):
    """Any number of them, in chunks that do not divide it, differing in any one layer."""
    alphas, thresholds = candidates
    exponents, tries = alphas[0][None].repeat(9, 0), thresholds[0, 0][None].repeat(9, 0)
    for layer in range(7):
        exponents[layer, layer], tries[layer + 1, layer] = 0.1, thresholds[1, 0, layer]
    single = BlockLoss(calibration, 0, 10**6, 1)
    expected = [single(exponents[i : i + 1], tries[i : i + 1])[0] for i in range(9)]
    for count in (1, 4, 9):
        together = BlockLoss(calibration, 0, 10**6, 4)(exponents[:count], tries[:count])
        np.testing.assert_allclose(together, expected[:count], rtol=1e-5)
    assert len(set(np.round(expected, 9))) == 9


def test_the_population_is_evaluated_as_one_by_one(calibration, candidates):
    alphas, thresholds = candidates
    together = KLLoss(calibration, 10**6, 3)(alphas, thresholds)
    single = KLLoss(calibration, 10**6, 1)
    np.testing.assert_allclose(together, [single(alphas, t[None])[0] for t in thresholds], rtol=1e-5)
    assert (together > 0).all() and len(set(together.round(8))) == 5


def test_kl_is_that_of_a_dense_start_and_a_sparse_rest(calibration, candidates, tiny_model, tiny_tokens):
    """Against an explicit run: every window alone, dense cache first, sparse positions after it."""
    from wisparse_jax.models.forward import empty_cache, head, hidden_states

    alphas, thresholds = candidates
    config, params = tiny_model.config, tiny_model.params
    rules = threshold_rules(calibration.gains, alphas, thresholds[0])
    first, total = calibration.dense_positions, []
    for row in tiny_tokens:
        cache = empty_cache(config, 1, len(row), jnp.float32)
        _, cache = hidden_states(config, params, row[None, :first], layout(config, 1, first), cache)
        rest = layout(config, 1, len(row) - first, first)
        hidden, _ = hidden_states(config, params, row[None, first:], rest, cache, rules)
        total.append(kl_divergence(tiny_model(row[None])[:, first:], head(params, hidden)).mean())
    np.testing.assert_allclose(KLLoss(calibration, 10**6, 2)(alphas, thresholds[:1]), np.mean(total), rtol=1e-4)


def test_no_candidate_compiles_anything(calibration, candidates):
    alphas, thresholds = candidates
    loss = KLLoss(calibration, 10**6, 5)
    loss(alphas, thresholds)
    with count_compilations() as compilations:
        loss(alphas * 0.5, thresholds * 1.1)
        loss(alphas * 0.9, thresholds * 0.7)
    assert compilations.count == 0
