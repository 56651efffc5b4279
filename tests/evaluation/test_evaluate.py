import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wisparse_jax.calibration import run_dense
from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation import DenseRun, evaluate, quality, split_windows, text_windows
from wisparse_jax.evaluation.windows import DENSE_FIRST
from wisparse_jax.models.basis import Basis, fold, folded_config, identity_basis
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.model import Model
from wisparse_jax.models.rules import ChannelRule
from wisparse_jax.search import SearchSettings, calibrate
from wisparse_jax.sparsity import apply
from wisparse_jax.testing import tiny_config, tiny_model


@pytest.fixture(scope="module")
def sparse(tiny_model, tiny_tokens):
    plan = calibrate(tiny_model, tiny_tokens, 0.5, "uniform", settings=SearchSettings(compare_teal=False))
    return apply(tiny_model, plan)


def test_dense_perplexity_is_that_of_the_logits(tiny_model, tiny_tokens):
    found = evaluate(tiny_model, tiny_tokens, sparse_prefill=1.0, dense_first=0)
    log_probs = jax.nn.log_softmax(tiny_model(tiny_tokens)[:, :-1])
    nll = -np.take_along_axis(np.asarray(log_probs), np.asarray(tiny_tokens)[:, 1:, None], -1)[..., 0]
    assert found.dense.perplexity.mean == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert found.dense.perplexity.error == pytest.approx(np.exp(nll.mean()) * nll.mean(1).std(ddof=1) / 2, rel=1e-3)
    assert found.tokens == nll.size


def test_a_fully_sparse_window_is_the_sparse_model(sparse, tiny_tokens):
    score = evaluate(sparse, tiny_tokens, sparse_prefill=1.0, dense_first=0).sparse["plan"]
    log_probs = jax.nn.log_softmax(sparse(tiny_tokens)[:, :-1])
    nll = -np.take_along_axis(np.asarray(log_probs), np.asarray(tiny_tokens)[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(score.nll, nll.mean(axis=1), rtol=1e-5)


def test_only_the_sparse_share_is_scored_after_a_dense_start(sparse, tiny_tokens):
    halves = evaluate(sparse, tiny_tokens, sparse_prefill=0.5)
    assert halves.scored_positions == 48 // 2 - 1
    # What comes before the sparse positions is dense, so it is the same whatever the plan.
    full = evaluate(sparse, tiny_tokens, sparse_prefill=1.0)
    assert halves.sparse["plan"].kl.mean != full.sparse["plan"].kl.mean
    # All of a window is all but its first positions.
    assert full.scored_positions == 48 - DENSE_FIRST - 1
    same = evaluate(sparse, tiny_tokens, sparse_prefill=1 - DENSE_FIRST / 48, dense_first=0)
    np.testing.assert_array_equal(same.sparse["plan"].window_kl, full.sparse["plan"].window_kl)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_known_dense_run_gives_the_same_figures(sparse, tiny_tokens, share, monkeypatch):
    """Also where it has the first positions, which are not scored."""
    expected = evaluate(sparse, tiny_tokens, sparse_prefill=share)
    run = run_dense(sparse.dense, tiny_tokens, SearchSettings(sparse_share=share))
    monkeypatch.setattr(quality, "_dense_block", None)  # nothing is run again
    found = evaluate(
        sparse, tiny_tokens, sparse_prefill=share, known=[DenseRun(run.params, run.inputs[-1], run.caches)]
    )
    np.testing.assert_allclose(found.dense.nll, expected.dense.nll, rtol=1e-5)
    np.testing.assert_allclose(found.sparse["plan"].window_kl, expected.sparse["plan"].window_kl, rtol=1e-4)


def test_the_share_can_be_held_as_in_generation(tiny_model, tiny_tokens, sparse):
    """With thresholds that skip too much or too little; where they fit, next to nothing changes."""
    plan = dataclasses.replace(sparse.plan, thresholds=sparse.plan.thresholds * 1.3)
    plans = {"off": apply(tiny_model, plan), "plan": sparse}
    windows = np.concatenate([tiny_tokens[:, :40]] * 2)
    loose, held = (evaluate(tiny_model, windows, plans, hold=hold).sparse for hold in (False, True))
    assert loose["off"].sparsity.mean > 0.57
    # Twenty tokens are few for the control to settle in.
    assert 0.45 < held["off"].sparsity.mean < loose["off"].sparsity.mean - 0.03
    assert (held["off"].token_sparsity[:, 0] == loose["off"].token_sparsity[:, 0]).all()  # factors begin at 1
    assert held["plan"].kl.mean == pytest.approx(loose["plan"].kl.mean, rel=0.2)
    assert held["off"].layer_sparsity.shape == (tiny_blocks(sparse), 7) and held["off"].nll.shape == (8,)
    rules = Model(tiny_model.config, tiny_model.params, sparse.rules)
    with pytest.raises(WisparseError, match="rules: hold: expected a model with its plan"):
        evaluate(tiny_model, windows, {"rules": rules}, hold=True)


def test_a_target_that_is_met_by_every_token_is_the_plain_run(tiny_model, tiny_tokens, sparse):
    """Nothing is owed where every channel is skipped and that is the target: token by token as all at once."""
    nothing = np.full_like(sparse.plan.thresholds, 1e30)
    plan = dataclasses.replace(sparse.plan, target=1.0, sparsities=np.ones_like(nothing), thresholds=nothing)
    model = apply(tiny_model, plan)
    loose, held = (evaluate(model, tiny_tokens, hold=hold).sparse["plan"] for hold in (False, True))
    np.testing.assert_allclose(held.window_kl, loose.window_kl, rtol=1e-4)
    np.testing.assert_allclose(held.nll, loose.nll, rtol=1e-5)
    np.testing.assert_array_equal(held.layer_sparsity, loose.layer_sparsity)


def test_realised_sparsity_on_the_calibration_text_is_the_target(sparse, tiny_tokens):
    """Thresholds are set along the sparse run, so every layer keeps to it; the last position of a window is not
    scored."""
    score = evaluate(sparse, tiny_tokens[:3]).sparse["plan"]  # the fourth window was held out
    assert score.layer_sparsity == pytest.approx(0.5, abs=0.03)
    assert score.token_sparsity.std() > 0 and score.layer_sparsity.shape == (tiny_blocks(sparse), 7)


def test_a_layer_counts_by_its_weights_and_a_block_like_any_other(tiny_model, tiny_tokens):
    """Of each block one layer is skipped whole."""
    config = tiny_model.config
    skipped = ["q", "up", "k"]
    rules = [
        {
            name: ChannelRule(jnp.full(config.layer_shapes[name][0], jnp.inf if name == layer else 0.0))
            for name in LAYERS
        }
        for layer in skipped
    ]
    score = evaluate(Model(config, tiny_model.params, rules), tiny_tokens).sparse["plan"]
    weights: dict[str, int] = dict(zip(LAYERS, config.layer_weights, strict=True))
    expected = sum(weights[name] for name in skipped) / (3 * sum(weights.values()))
    assert score.sparsity.mean == pytest.approx(expected, rel=1e-6) and expected == pytest.approx(13 / 99)
    np.testing.assert_array_equal(score.layer_sparsity, [[name == layer for name in LAYERS] for layer in skipped])


def tiny_blocks(sparse):
    return sparse.config.num_blocks


def test_batching_does_not_change_the_figures(sparse, tiny_tokens, monkeypatch):
    whole = evaluate(sparse, tiny_tokens)
    monkeypatch.setattr("wisparse_jax.evaluation.quality.TOKENS_AT_ONCE", 48 * 3)
    parts = evaluate(sparse, tiny_tokens)  # batches of 3 and 1
    np.testing.assert_allclose(parts.sparse["plan"].window_kl, whole.sparse["plan"].window_kl, rtol=1e-4)
    assert parts.tokens == whole.tokens


def test_json_has_the_agreed_fields(sparse, tiny_tokens):
    out = evaluate(sparse, tiny_tokens).as_json("plan")
    assert {"perplexity", "dense_perplexity", "kl", "sparsity", "tokens", "sparse_prefill", "window"} <= set(out)
    assert "perplexity" not in evaluate(sparse.dense, tiny_tokens).as_json()
    single = evaluate(sparse, tiny_tokens[:1]).as_json("plan")
    assert single["kl_error"] is None  # one window has no standard error


def test_paired_difference_is_over_windows(sparse, tiny_model, tiny_tokens):
    other = apply(
        tiny_model, calibrate(tiny_model, tiny_tokens, 0.3, "wina", settings=SearchSettings(compare_teal=False))
    )
    found = evaluate(tiny_model, tiny_tokens, {"a": sparse, "b": other})
    gap = found.paired("a", "b")
    differences = found.sparse["a"].window_kl - found.sparse["b"].window_kl
    assert gap.mean == pytest.approx(differences.mean()) and gap.mean > 0
    assert gap.error == pytest.approx(differences.std(ddof=1) / 2)


def test_a_folded_model_is_scored_after_a_dense_start_of_its_own():
    """Its caches are in another basis. Of the same function nothing is lost, whether or not the head is tied."""
    tokens = jax.random.randint(jax.random.key(1), (3, 48), 0, 97)
    for tied in (False, True):
        model = tiny_model(tiny_config(tied_embeddings=tied))
        config, shape = model.config, (3, 2, 8, 8)
        turn = jnp.linalg.qr(jax.random.normal(jax.random.key(2), shape))[0]
        still = identity_basis(config)
        for basis in (still._replace(heads=turn), Basis(jnp.linalg.qr(jnp.eye(32)[::-1] + 0.1)[0], turn)):
            folded = Model(folded_config(config), fold(config, model.params, basis))
            result = evaluate(model, tokens, {"folded": folded})
            assert result.sparse["folded"].kl.mean < 1e-6
            np.testing.assert_allclose(result.sparse["folded"].nll, result.dense.nll, rtol=1e-4)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.01, float("nan"), 0.001])
def test_a_share_that_leaves_nothing_is_refused(tiny_model, tiny_tokens, share):
    with pytest.raises(WisparseError, match="sparse-prefill"):
        evaluate(tiny_model, tiny_tokens, sparse_prefill=share)


class Letters:
    """A tokenizer of one token a letter, BOS 0."""

    def encode(self, text, bos=True):
        return [0] * bos + [ord(c) - 96 for c in text]


def test_windows_are_consecutive_and_start_with_bos():
    windows = split_windows(Letters(), "abcdefgh", 4)
    np.testing.assert_array_equal(windows, [[0, 1, 2, 3], [0, 4, 5, 6]])
    assert len(split_windows(Letters(), "abcdefgh", 4, tokens=4)) == 1
    assert len(split_windows(Letters(), "abcdefgh", 4, tokens=5)) == 2


@pytest.mark.parametrize("tokens", [1, 100, 2_000])
def test_the_first_windows_are_those_of_the_whole_text_however_long_its_tokens_are(tokens):
    """Text is not cut by characters before its tokens are counted."""
    text = ("word " + "x" * 99) * 30_000

    class Words(Letters):
        def encode(self, text, bos=True):
            return [0] * bos + [len(word) for word in text.replace("x" * 99, " x").split()]

    found = split_windows(Words(), text, 64, tokens)
    assert len(found) == -(-tokens // 64) and found.tolist() == split_windows(Words(), text, 64)[: len(found)].tolist()


def test_files_that_cannot_be_used_are_named(tmp_path):
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("ab")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in ((short, "too few"), (binary, "not UTF-8"), (tmp_path / "none.txt", "no such file")):
        with pytest.raises(WisparseError, match=message) as caught:
            text_windows(Letters(), path, 4)
        assert str(path) in str(caught.value)
    with pytest.raises(WisparseError, match="window, in tokens = 1: expected 2 or above"):
        text_windows(Letters(), short, 1)


def test_token_ids_outside_the_vocabulary_are_refused(tiny_model):
    with pytest.raises(WisparseError, match="outside the vocabulary"):
        evaluate(tiny_model, jnp.full((1, 8), 10**6))
