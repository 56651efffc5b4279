"""What the decode benchmark compares: the dense baseline is the model, and layers really skip their share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_table import add_ratios
from dense_step import dense_logits, fused
from random_model import calibrated, random_cache, random_params

from kernels_pallas.sparse_linear.reference import keep_mask
from wisparse_jax.inference.loop import token_logits
from wisparse_jax.models.config import INPUT_GROUPS
from wisparse_jax.models.forward import hidden_states, layout
from wisparse_jax.models.rules import rules_of
from wisparse_jax.testing import tiny_config, tiny_model


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "qkv_bias": True, "windows": (4, None, 4)}])
@pytest.mark.parametrize("kernels", [False, True])
def test_the_dense_baseline_is_the_plain_step(changes, kernels):
    model = tiny_model(tiny_config(**changes))
    config, params = model.config, model.params
    cache, start = random_cache(config, 2, 32, jnp.float32), jnp.array([0, 3], jnp.int32)
    token = (jnp.array([5, 9], jnp.int32), jnp.int32(20), start)
    expected, expected_cache = token_logits(config, params, *token, cache, None)
    found, found_cache = dense_logits(config, kernels, params, fused(params), *token, cache)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    for one, other in zip(jax.tree.leaves(found_cache), jax.tree.leaves(expected_cache), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_every_layer_of_a_random_model_skips_its_share():
    config = tiny_config(hidden_size=128, intermediate_size=256)
    params = random_params(config, "float32")
    cache, start = random_cache(config, 4, 64, jnp.float32), jnp.zeros(4, jnp.int32)
    thresholds = calibrated(config, params, cache, 32, 4, 0.6)
    records = []
    where = layout(config, 4, 1, jnp.int32(32), start)
    tokens = jnp.arange(5, 9)[:, None]
    hidden_states(config, params, tokens, where, cache, rules_of(thresholds), records)
    for limits, record in zip(thresholds, records, strict=True):
        for names in INPUT_GROUPS.values():
            kept = float(keep_mask(record[names[0]], limits[names[0]]).mean())
            assert abs(1 - kept - 0.6) < 0.1


def test_ratios_are_to_the_fastest_dense_run_in_the_same_weights_and_as_stored():
    def row(weights, speed, **sparse):
        return {"weights": weights, "tokens_per_second": speed, **sparse}

    rows = [row("stored", 100.0), row("stored", 125.0), row("stored", 200.0, sparsity=0.5)]
    rows += [row("int8", 160.0), row("int8", 320.0, sparsity=0.5), row("int4", 500.0, sparsity=0.5)]
    add_ratios(rows)
    assert [r["ratio"] for r in rows] == [0.8, 1.0, 1.6, 1.0, 2.0, None]
    assert [r["ratio_to_stored"] for r in rows] == [0.8, 1.0, 1.6, 1.28, 2.56, 4.0]
