"""What the model writes for calibration: documents, one after another, and a check that text is text."""

import copy
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wisparse_jax as ws
from wisparse_jax.calibration import check_variety
from wisparse_jax.calibration.variety import effective_distinct
from wisparse_jax.errors import WisparseError
from wisparse_jax.inference import sample_windows
from wisparse_jax.inference.openers import Openers, openers_for
from wisparse_jax.models.tokenizer import Tokenizer
from wisparse_jax.testing import tiny_config, tiny_model


def endless(**changes):
    """A model without end-of-sequence tokens."""
    return tiny_model(tiny_config(eos_token_ids=(), **changes))


# BOS, EOS -> the first token of a window (None: any), what closes a document and is followed by BOS, and what a
# document starts from.
ARRANGEMENTS = {
    "two": ((0,), (1,), 0, {1}, {0}),
    "several ends": ((0,), (1, 2, 40), 0, {1, 2, 40}, {0}),
    "two, anywhere": ((60,), (33,), 60, {33}, {60}),
    "one and the same": ((0,), (0,), 0, set(), {0}),
    "one and the same, at the end of the vocabulary": ((96,), (96,), 96, set(), {96}),
    "the beginning among the ends": ((50,), (40, 50), 50, {40}, {50}),
    "several beginnings": ((50, 51), (51, 52), 50, {52}, {50, 51}),
    "no beginning": ((), (7, 9), 7, set(), {7, 9}),
    "no end": ((0,), (), 0, set(), set()),
    "none": ((), (), None, set(), set()),
    "a beginning outside the vocabulary": ((97,), (7,), 7, set(), {7}),
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_what_is_sampled_are_documents_one_after_another(name):
    bos, eos, first, closing, opening = ARRANGEMENTS[name]
    model = tiny_model(tiny_config(bos_token_ids=bos, eos_token_ids=eos))
    windows = sample_windows(model, 60, 64, seed=0)
    before, after = windows[:, :-1], windows[:, 1:]
    if first is None:
        assert len(set(windows[:, 0].tolist())) > 30
    else:
        assert (windows[:, 0] == first).all()
    closed = np.isin(before, list(closing))
    assert closed.any() == bool(closing) and (after[closed] == first).all()
    opened = np.isin(before, list(opening))
    assert not np.isin(after[opened], eos).any()  # no empty documents
    assert not opening or len(set(after[opened].tolist())) > 20  # which begin in many ways
    later = windows[:, 1:]
    assert not eos or np.isin(later, eos).sum() > 5  # and do end
    check_variety(windows, 97)


def test_a_document_after_a_separator_has_the_models_own_distribution():
    """One token is BOS and EOS: what follows it anywhere is sampled, as after BOS, without an empty document."""
    model = tiny_model(tiny_config(bos_token_ids=(3,), eos_token_ids=(3,)))
    windows = sample_windows(model, 4000, 2, seed=0, batch=1000)
    shares = np.bincount(windows[:, 1], minlength=97) / 4000
    logits = model(jnp.full((1, 1), 3, jnp.int32))[0, 0].at[3].set(-jnp.inf)
    assert np.abs(shares - np.asarray(jax.nn.softmax(logits))).sum() < 0.2


def test_it_repeats_by_seed_and_not_by_batch():
    model = tiny_model(tiny_config(eos_token_ids=(1, 2)))
    windows = sample_windows(model, 5, 40, seed=0)
    assert windows.shape == (5, 40) and windows.dtype == np.int32
    np.testing.assert_array_equal(windows, sample_windows(model, 5, 40, seed=0, batch=2))
    assert (windows != sample_windows(model, 5, 40, seed=1)).any()


def test_self_text_has_the_models_own_distribution():
    """The second token of many windows against the model's probabilities after BOS."""
    model = endless()
    windows = sample_windows(model, 4000, 2, seed=0, batch=1000)
    shares = np.bincount(windows[:, 1], minlength=97) / 4000
    expected = np.asarray(jax.nn.softmax(model(jnp.zeros((1, 1), jnp.int32))[0, 0]))
    assert np.abs(shares - expected).max() < 4 * np.sqrt(0.25 / 4000)
    assert np.abs(shares - expected).sum() < 0.2 < np.abs(1 / 97 - expected).sum()


@pytest.mark.parametrize(("windows", "length"), [(0, 8), (3, 1), (3, 65)])
def test_self_text_of_an_impossible_size_is_refused(windows, length):
    with pytest.raises(WisparseError, match="2 to 64 tokens"):
        sample_windows(endless(), windows, length, seed=0)


def english():
    text = (
        "The ferry left the harbour before seven, while the lamps along the quay were still burning. There were only "
        "five of us on deck: two farmers who took a crate of hens to the market, a schoolmaster, and myself. "
    ) * 4
    return np.frombuffer(text.encode(), np.uint8)[:512].astype(np.int32).reshape(4, 128)


def test_variety_of_text_in_bytes_suffices():
    check_variety(english(), 256)
    assert 12 < effective_distinct(english()).min() < 25


def test_variety_of_bases_suffices_in_their_vocabulary():
    check_variety(np.random.default_rng(0).integers(0, 4, (8, 128)), 12)


def test_a_few_degenerate_windows_are_let_pass():
    windows = np.random.default_rng(0).integers(0, 500, (8, 128))
    windows[:2] = 7
    check_variety(windows, 500)


DEGENERATE = {
    "nothing but one token": lambda ids: np.full_like(ids, 7),
    "one token after the first half": lambda ids: np.where(np.arange(128) < 64, ids, 7),
    "three go round": lambda ids: np.broadcast_to(np.arange(128) % 3 + 5, ids.shape),
    "every token twice": lambda ids: np.repeat(ids[:, :64], 2, axis=1),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_text_is_refused(name):
    ids = np.random.default_rng(0).integers(0, 500, (8, 128))
    check_variety(ids, 500)
    with pytest.raises(WisparseError, match=r"the text is degenerate: in 8 of 8 windows .* found token"):
        check_variety(DEGENERATE[name](ids), 500)


@pytest.mark.parametrize("name", ["two", "several ends", "one and the same", "no beginning", "several beginnings"])
def test_documents_go_on_from_openers_in_turn(name):
    bos, eos, first, closing, _ = ARRANGEMENTS[name]
    model = tiny_model(tiny_config(bos_token_ids=bos, eos_token_ids=eos))
    # The second holds the token that ends a document, as the turns of a chat do.
    own = [[11, 12, 13], [21, eos[0], 22], [31]]
    given = Openers(np.array([row + [-1] * (3 - len(row)) for row in own], np.int32), ("a", "b", "c"))
    windows = sample_windows(model, 24, 64, seed=0, openers=given)
    ended = 0
    for w, window in enumerate(windows.tolist()):
        assert window[0] == first
        at, document = 1, w
        while at < len(window):
            opener = own[document % 3]
            assert window[at : at + len(opener)] == opener[: len(window) - at]
            at += len(opener)
            assert at >= len(window) or window[at] not in eos  # no document is its opener alone
            at = next((i for i in range(at, len(window)) if window[i] in eos), len(window))
            ended += at < len(window)
            if at < len(window) and window[at] in closing:
                at += 1
                assert at == len(window) or window[at] == first
            at, document = at + 1, document + 1
    assert ended > 12
    np.testing.assert_array_equal(windows[:5], sample_windows(model, 5, 64, seed=0, batch=2, openers=given))
    assert (windows != sample_windows(model, 24, 64, seed=1, openers=given)).any()


def test_a_vocabulary_says_which_openers_a_model_gets():
    """The demo's is of English prose alone, and it has no chat template."""
    found = openers_for(ws.load_tokenizer("demo"))
    kinds = set(found.kinds)
    assert {"prose", "encyclopaedia", "dialogue", "e-mail"} <= kinds and not kinds & {"languages", "python", "chat"}
    assert len(set(found.kinds[:5])) == 5 and re.fullmatch(rf"{len(found.kinds)} openers, [0-9a-f]{{8}}", str(found))
    tokenizer = ws.load_tokenizer("demo")
    texts = [tokenizer.decode(row[row >= 0].tolist()) for row in found.tokens]
    assert any(text.startswith("The ferry was late again") for text in texts)


def test_a_model_with_a_chat_template_answers_questions(tmp_path):
    """Every second opener, in the template and without the BOS that it writes."""
    tokenizer = ws.load_tokenizer("demo")
    inner = copy.deepcopy(tokenizer.inner)
    inner.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"
    )
    found = openers_for(Tokenizer(inner))
    chats = [row[row >= 0].tolist() for row, kind in zip(found.tokens, found.kinds, strict=True) if kind == "chat"]
    assert found.kinds[1::2][: len(chats)] == ("chat",) * len(chats) and len(chats) > 10
    assert {"python", "c"} <= set(found.kinds) and "languages" not in found.kinds
    for row in chats:
        text = tokenizer.inner.decode(row)
        assert text.startswith("<user> ") and text.endswith("\n<assistant>") and row[0] != inner.bos_token_id
