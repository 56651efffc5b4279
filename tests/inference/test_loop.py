import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wisparse_jax as ws
from wisparse_jax.commands.generate import Generate
from wisparse_jax.commands.writer import Writer
from wisparse_jax.inference import GREEDY, Sample, steps
from wisparse_jax.inference.loop import LoopState, token_loop
from wisparse_jax.inference.steps import decode_implementation
from wisparse_jax.models.rules import ChannelRule
from wisparse_jax.testing import tiny_config

ROOM, VOCAB = 24, 13
TABLE = jax.random.normal(jax.random.key(0), (VOCAB, VOCAB))


def follow(tokens, slot, start, cache):
    """Logits of the newest token and of what stands in the slot before it; the token goes into its own."""
    cache = cache.at[:, slot].set(tokens)
    return TABLE[tokens] + TABLE[cache[:, slot - 1]] * 0.5, cache


@functools.partial(jax.jit, static_argnums=3)
def run(state, until, stops, together):
    start = jnp.zeros(len(state.last), jnp.int32)
    return token_loop(follow, state, until, start, GREEDY.values(VOCAB), stops, together)


def first(tokens):
    last = jnp.asarray(tokens, jnp.int32)
    batch = len(tokens)
    keys = jax.random.split(jax.random.key(1), batch)
    chosen = jnp.full((batch, ROOM), -1, jnp.int32).at[:, 0].set(last)
    cache: Any = jnp.zeros((batch, ROOM + 1), jnp.int32)
    seen = jnp.zeros((batch, VOCAB), bool).at[jnp.arange(batch), last].set(True)
    return LoopState(jnp.int32(1), jnp.int32(1), chosen, last, jnp.zeros(batch, bool), keys, cache, seen)


@pytest.mark.parametrize("together", [4, 16])
@pytest.mark.parametrize("until", [2, 4, 5, 6, 17, 22, 24])
def test_several_tokens_between_looks_are_the_same_tokens(together, until):
    alone, several = (run(first([3, 8]), until, jnp.asarray([-2]), n) for n in (1, together))
    for a, b in zip(alone[:5], several[:5], strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(alone.step) == until and (np.asarray(alone.tokens)[:, :until] >= 0).all()


def test_what_comes_after_the_last_row_has_finished_is_no_token():
    tokens = np.asarray(run(first([3]), ROOM, jnp.asarray([-2]), 1).tokens)[0]
    stop = next(t for t in tokens[2:] if t not in tokens[:2])
    at = int(np.argmax(tokens == stop))
    alone, several = (run(first([3]), ROOM, jnp.asarray([stop]), n) for n in (1, 16))
    np.testing.assert_array_equal(alone.tokens, several.tokens)
    assert int(alone.step) == at + 1 <= int(several.step) < at + 1 + 16
    assert bool(several.finished[0]) and (np.asarray(several.tokens)[0, at + 1 :] == -1).all()


def test_every_token_of_a_row_has_noise_of_its_own():
    """All tokens are equally likely whatever came before: with the noise of one step they would all be the same."""

    @jax.jit
    def sampled(state):
        def flat(tokens, slot, start, cache):
            return jnp.zeros((len(tokens), VOCAB)), cache

        values = Sample().values(VOCAB)
        return token_loop(flat, state, jnp.int32(ROOM), jnp.zeros(2, jnp.int32), values, jnp.asarray([-2]), 4).tokens

    rows = np.asarray(sampled(first([3, 8])))[:, 1:]
    assert all(len(set(row.tolist())) >= VOCAB // 2 for row in rows) and (rows[0] != rows[1]).any()
    # The steps' keys are those of the prompt's end and of every token behind it.
    key = jax.random.split(jax.random.key(1), 2)[0]
    draws = [int(jax.random.categorical(jax.random.fold_in(key, step), jnp.zeros(VOCAB))) for step in range(1, ROOM)]
    assert rows[0].tolist() == draws


def test_the_loop_goes_on_where_it_was_left():
    whole, state = run(first([3, 8]), 22, jnp.asarray([-2]), 4), first([3, 8])
    for until in (7, 8, 17, 22):
        state = run(state, until, jnp.asarray([-2]), 4)
    np.testing.assert_array_equal(whole.tokens, state.tokens)


@pytest.mark.parametrize(
    ("sparse", "batch", "hopper", "fits", "expected"),
    [
        (True, 1, True, True, "mosaic"),
        (False, 1, True, True, "mosaic"),
        (True, 1, False, True, "triton"),
        (False, 1, False, True, "xla"),
        (True, 1, True, False, "triton"),
        (False, 1, True, False, "xla"),
        (True, 2, True, True, "xla"),
        (False, 2, True, True, "xla"),
        (True, 16, True, True, "xla"),
    ],
)
def test_which_step_a_gpu_takes(monkeypatch, sparse, batch, hopper, fits, expected):
    monkeypatch.setattr(steps, "choose_kernels", lambda *_, **__: "triton")
    monkeypatch.setattr(steps, "mosaic_problem", lambda: None if hopper else "needs another GPU")
    monkeypatch.setattr(steps, "fused_step_problem", lambda *_: None if fits else "has no room")
    rules = [{"q": ChannelRule(jnp.zeros(2))}] if sparse else None
    assert decode_implementation(tiny_config(), {}, rules, batch) == expected


@pytest.mark.parametrize("implementation", [None, "mosaic"])
def test_a_command_asks_before_there_are_weights(monkeypatch, implementation):
    """On a Hopper GPU, where what decodes depends on them."""
    monkeypatch.setattr(steps, "choose_kernels", lambda named, **_: named or "triton")
    monkeypatch.setattr(steps, "mosaic_problem", lambda: None)
    options = Generate("demo", prompt="x", implementation=implementation)
    assert Writer(options, "demo").config.num_blocks == 8


def test_a_device_may_take_the_kernels_for_more_sequences(monkeypatch):
    """As many as its own step was measured for: here two by the one that takes several, one by the other."""
    monkeypatch.setattr(steps, "choose_kernels", lambda *_, **__: "triton")
    monkeypatch.setattr(steps, "mosaic_problem", lambda: None)
    monkeypatch.setattr(steps, "fused_step_problem", lambda *_: None)
    monkeypatch.setattr(steps, "largest_batch", {"mosaic": 1, "triton": 2}.get)
    rules = [{"q": ChannelRule(jnp.zeros(2))}]
    assert [decode_implementation(tiny_config(), {}, rules, n) for n in (1, 2, 3)] == ["mosaic", "triton", "xla"]
    assert [decode_implementation(tiny_config(), {}, None, n) for n in (1, 2, 3)] == ["mosaic", "xla", "xla"]


def test_a_dense_model_is_not_for_the_triton_step(monkeypatch):
    monkeypatch.setattr(steps, "choose_kernels", lambda *_, **__: "triton")
    with pytest.raises(ws.WisparseError, match="'triton' runs sparse models only; this one is dense"):
        decode_implementation(tiny_config(), {}, None, 1, "triton")


def test_what_a_step_that_is_named_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr(steps, "choose_kernels", lambda named, **_: named)
    monkeypatch.setattr(steps, "fused_step_problem", lambda *_: "has no room")
    rules = [{"q": ChannelRule(jnp.zeros(2))}]
    assert decode_implementation(tiny_config(), {}, rules, 16, "triton") == "triton"
    with pytest.raises(ws.WisparseError, match="'triton' takes at most 16 sequences, found 17"):
        decode_implementation(tiny_config(), {}, rules, 17, "triton")
    with pytest.raises(ws.WisparseError, match="'mosaic' has no room"):
        decode_implementation(tiny_config(), {}, rules, 1, "mosaic")
