"""Answers as text: chat templates, stop texts, and how they end."""

from __future__ import annotations

import dataclasses

import pytest

import wisparse_jax as ws
from wisparse_jax.errors import WisparseError
from wisparse_jax.inference import encode_prompt
from wisparse_jax.inference.text import Answer, StopTexts
from wisparse_jax.inference.timing import CompileClock, timed

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m.role }}: {{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return ws.load_tokenizer("demo")


@pytest.fixture
def chatting(tokenizer, monkeypatch):
    """The same with a chat template."""
    monkeypatch.setattr(tokenizer.inner, "chat_template", TEMPLATE)
    return tokenizer


def test_a_stream_is_what_generate_writes(demo, tokenizer):
    prompt = "In the morning the"
    answer = ws.stream(demo, tokenizer, prompt, max_new_tokens=20)
    pieces = list(answer)
    ids = tokenizer.encode(prompt)
    expected = ws.generate(demo, [ids], max_new_tokens=20)[0]
    assert "".join(pieces) == answer.text == tokenizer.decode(expected, after=ids)
    assert answer.tokens == expected and answer.prompt == ids and answer.stop_reason == "length"
    assert len(pieces) >= 3  # one token, eight, the rest
    assert next(answer, None) is None


def test_a_stop_text_ends_the_answer_and_the_work(demo, tokenizer):
    whole = ws.stream(demo, tokenizer, "In the morning the", max_new_tokens=40)
    text = "".join(whole)
    stop = text[9:12]
    answer = ws.stream(demo, tokenizer, "In the morning the", max_new_tokens=40, stop=["never there", stop])
    assert "".join(answer) == text[: text.index(stop)] and answer.stop_reason == "stop"
    assert len(answer.tokens) < len(whole.tokens)


def test_an_answer_ends_where_the_model_ends_it(demo, tokenizer):
    first, second = ws.generate(demo, [tokenizer.encode("In the morning the")], max_new_tokens=2)[0]
    ending = dataclasses.replace(demo.config, eos_token_ids=(second,))
    model = ws.Llama.from_params(ending, demo.params)
    answer = ws.stream(model, tokenizer, "In the morning the", max_new_tokens=8)
    list(answer)
    assert answer.tokens == [first] and answer.stop_reason == "end"


def test_a_chat_template_is_applied_unless_raw(chatting):
    def text(*args, **kwargs):
        return chatting.inner.decode(encode_prompt(chatting, *args, **kwargs))

    assert text("Hello.") == "[user: Hello.]>"
    assert text("Hello.", system="Be kind.") == "[system: Be kind.][user: Hello.]>"
    assert text([{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]) == "[user: A][assistant: B]>"
    assert encode_prompt(chatting, "Hello.", raw=True) == chatting.encode("Hello.")


def test_what_a_model_without_a_template_cannot_do_is_refused(tokenizer):
    assert encode_prompt(tokenizer, "Hello.") == tokenizer.encode("Hello.")
    with pytest.raises(WisparseError, match="system: expected no system message, as the model has no chat template"):
        encode_prompt(tokenizer, "Hello.", system="Be kind.")
    with pytest.raises(WisparseError, match="messages: expected a text, as the model has no chat template"):
        encode_prompt(tokenizer, [{"role": "user", "content": "Hello."}])


def test_what_a_template_refuses_is_one_error(chatting, demo):
    with pytest.raises(WisparseError, match="chat template refuses the conversation: no tools here"):
        encode_prompt(chatting, [{"role": "tool", "content": "1"}])
    with pytest.raises(WisparseError, match="as a text that is continued has none"):
        encode_prompt(chatting, "Hello.", raw=True, system="Be kind.")
    with pytest.raises(WisparseError, match="stop: expected texts, found an empty one"):
        ws.stream(demo, chatting, "Hello.", stop=["", "x"])


@pytest.mark.parametrize(
    ("stop", "pieces", "shown"),
    [
        ((), ["a", "b"], ["a", "b"]),
        (("END",), ["to the E", "ND. More"], ["to the ", ""]),
        (("END",), ["to the E", "N", "ough"], ["to the ", "", "ENough"]),
        (("aab",), ["aa", "ab"], ["", "a"]),
        (("x", "\n\n"), ["a\n", "b\n", "\nx"], ["a", "\nb", ""]),
        (("later", "ate"), ["later"], [""]),
    ],
)
def test_stop_texts_across_pieces(stop, pieces, shown):
    stops = StopTexts(stop)
    assert [stops.add(piece) for piece in pieces] == shown
    whole = "".join(pieces)
    assert stops.found == any(text in whole for text in stop)
    assert stops.rest() == ("" if stops.found else whole[len("".join(shown)) :])


def test_times_leave_compiling_out(tokenizer):
    """By a clock that says that 0.05 s went into compiling before each piece."""
    import time

    clock = CompileClock()

    def tokens():
        for piece in ([40], [41, 42, 43]):
            time.sleep(0.06)
            clock.seconds += 0.05
            yield [piece]

    shown = []
    timing = timed(Answer(tokenizer, [39], tokens(), 4), clock, shown.append)
    assert timing.compile == pytest.approx(0.1) and timing.tokens == 4 and shown
    assert 0.01 <= timing.first_token < 0.05 and timing.total >= 0.02
    assert timing.rate == pytest.approx(3 / (timing.total - timing.first_token))
    assert "compile 0.1 s, first token 0.0" in str(timing) and "4 tokens" in str(timing)
