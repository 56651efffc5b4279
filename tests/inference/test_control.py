"""The share that is skipped in the token loop is the plan's, whatever its thresholds skip on the text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wisparse_jax.inference import Sample
from wisparse_jax.inference.generate import token_stream
from wisparse_jax.inference.steps import kernel_step, masked_step
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.control import LEAST, MOST, Control
from wisparse_jax.models.decode import group_thresholds
from wisparse_jax.models.forward import empty_cache, hidden_states, layout
from wisparse_jax.models.rules import rules_of
from wisparse_jax.search import SearchSettings, calibrate
from wisparse_jax.sparsity import apply
from wisparse_jax.testing import count_compilations, tiny_config, tiny_model

PROMPTS = [[5, 9, 2, 40, 11], [3], [7, 7, 7, 60, 61, 62, 63, 8, 9]]


@pytest.fixture(scope="module")
def plan_and_model(tiny_tokens):
    model = tiny_model(tiny_config(eos_token_ids=(), context=512))
    return calibrate(model, tiny_tokens, 0.5, "wina", settings=SearchSettings(compare_teal=False)), model


def off(plan_and_model, factor):
    """The model with thresholds that skip too much or too little."""
    plan, model = plan_and_model
    return apply(model, dataclasses.replace(plan, thresholds=plan.thresholds * factor))


def run(model, new, prompts=PROMPTS, **how):
    realised, rows = [], [[] for _ in prompts]
    for piece in token_stream(model, prompts, new, Sample(1.0), seed=3, realised=realised, **how):
        for row, tokens in zip(rows, piece, strict=True):
            row.extend(tokens)
    return rows, realised


@pytest.mark.parametrize("factor", [0.75, 1.0, 1.3])
def test_what_is_skipped_is_what_was_asked_for(plan_and_model, factor):
    model = off(plan_and_model, factor)
    _, loose = run(model, 300, hold=False)
    _, held = run(model, 300)
    assert len(held) == 3 and np.abs(np.array(held) - 0.5).max() < 0.01
    assert factor == 1 or np.abs(np.array(loose) - 0.5).min() > 0.05


def test_there_are_ends_to_it(plan_and_model):
    """Thresholds of nearly nothing are not blown up to the target, and the way back from an end is short."""
    _, held = run(off(plan_and_model, 0.1), 100)
    assert max(held) < 0.2
    control = Control.start(0.5, True, 1)
    for _ in range(2000):
        control = control.after(jnp.zeros(1), jnp.ones(1, bool))
    assert float(control.factors[0]) == pytest.approx(MOST)
    steps = 0
    while float(control.factors[0]) > 1 and steps < 200:
        control, steps = control.after(jnp.ones(1), jnp.ones(1, bool)), steps + 1
    assert steps < 20
    for _ in range(2000):
        control = control.after(jnp.ones(1), jnp.ones(1, bool))
    assert float(control.factors[0]) == pytest.approx(LEAST)


def test_it_settles_without_swinging():
    """On a text whose share is 0.4 at a factor of 1 and grows by 0.4 of the factor's logarithm."""

    def shares(base, steps):
        control, found = Control.start(0.5, True, 1), []
        for _ in range(steps):
            skipped = base + 0.4 * jnp.log(control.factors)
            control = control.after(skipped, jnp.ones(1, bool))
            found.append(float(skipped[0]))
        return np.array(found)

    found = shares(0.4, 400)
    assert abs(found[:128].mean() - 0.5) < 0.01 and abs(found[:300].mean() - 0.5) < 0.001
    assert np.abs(found[250:] - 0.5).max() < 0.003 and found.max() < 0.53


def test_a_row_does_not_depend_on_its_neighbours(plan_and_model):
    model = off(plan_and_model, 1.2)
    together, shares = run(model, 60)
    for b in (0, 1):
        # A row draws from the seed and its place, so that its neighbours only are left out.
        alone, own = run(model, 60, PROMPTS[: b + 1])
        assert alone[b] == together[b] and own[b] == pytest.approx(shares[b], abs=1e-6)


def test_the_same_seed_writes_the_same_and_nothing_compiles_anew(plan_and_model):
    model, other = off(plan_and_model, 1.2), off(plan_and_model, 0.9)
    first = run(model, 40)
    with count_compilations() as compilations:
        assert run(model, 40) == first and run(model, 40, hold=False) != first
        assert run(other, 40) != first
    assert compilations.count == 0


def test_pieces_change_nothing(plan_and_model):
    model = off(plan_and_model, 1.2)
    whole, pieces = run(model, 50, every=None), run(model, 50, every=8)
    assert whole == pieces


def test_rows_that_have_ended_are_not_counted(plan_and_model):
    model = off(plan_and_model, 1.0)
    text = run(model, 40, PROMPTS[:2])[0]
    stop = next(t for t in text[0][5:] if t not in text[0][:5])
    at = text[0].index(stop)
    ended = dataclasses.replace(model.config, eos_token_ids=(stop,))
    plan, dense = plan_and_model
    again = apply(type(dense)(ended, dense.params), plan)
    rows, shares = run(again, 40, PROMPTS[:2])
    assert rows[0] == text[0][:at]
    assert shares[0] == pytest.approx(run(model, at + 1, PROMPTS[:1])[1][0], abs=1e-6)


def test_a_dense_model_realises_nothing(plan_and_model):
    assert run(plan_and_model[1], 4)[1] == []


def test_the_share_is_that_of_the_masks(plan_and_model):
    """Of one step, by hand from what the layers read."""
    model, factors = off(plan_and_model, 1.0), jnp.array([0.8, 1.0, 1.5])
    config, start, tokens = model.config, jnp.zeros(3, jnp.int32), jnp.array([5, 9, 11])
    cache = empty_cache(config, 3, 8, jnp.float32)
    _, _, shares = masked_step(config, model.params, model.rules)(tokens, jnp.int32(0), start, cache, factors)
    for b, factor in enumerate(factors):
        own = rules_of([{n: limit * factor for n, limit in block.items()} for block in model.thresholds])
        records, cache = [], empty_cache(config, 1, 8, jnp.float32)
        where = layout(config, 1, 1, 0, start[:1])
        hidden_states(config, model.params, tokens[b : b + 1, None], where, cache, own, records)
        kept = 0
        for record, limits in zip(records, model.thresholds, strict=True):
            counts = {n: int((np.abs(record[n][0, 0]) >= limits[n] * factor).sum()) for n in LAYERS}
            kept += sum(count * config.layer_shapes[n][1] for n, count in counts.items())
        assert float(shares[b]) == pytest.approx(1 - kept / (3 * sum(config.layer_weights)), abs=1e-6)
    assert float(shares[0]) < float(shares[2])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_the_kernels_step_holds_the_same_share(plan_and_model, batch, implementation):
    """Logits, shares and factors of some tokens, by the kernels' references and by interpreted kernels."""
    interpret = jax.default_backend() != "gpu"
    model = tiny_model(tiny_config(num_blocks=1, windows=(None,)))
    config, start = model.config, jnp.zeros(batch, jnp.int32)
    limits = [{n: jnp.full(config.layer_shapes[n][0], 0.1 if n == "down" else 0.7) for n in LAYERS}]
    steps = [
        jax.jit(masked_step(config, model.params, rules_of(limits))),
        jax.jit(
            kernel_step(
                config, model.params, group_thresholds(limits), implementation=implementation, interpret=interpret
            )
        ),
    ]
    controls, caches = [Control.start(0.5, True, batch)] * 2, [empty_cache(config, batch, 16, jnp.float32)] * 2
    for slot in range(4):
        token, out = jnp.arange(3 + slot, 3 + slot + batch), []
        for i, step in enumerate(steps):
            logits, caches[i], shares = step(token, jnp.int32(slot), start, caches[i], controls[i].factors)
            controls[i] = controls[i].after(shares, jnp.ones(batch, bool))
            out.append(logits)
        assert np.abs(out[0] - out[1]).max() <= 1e-4 * np.abs(out[0]).max()
        np.testing.assert_allclose(controls[0].factors, controls[1].factors, rtol=1e-5)
        np.testing.assert_allclose(controls[0].skipped, controls[1].skipped, rtol=1e-5)
    assert (np.asarray(controls[0].factors) != 1).all()
