"""Answers as text: chat templates, stop texts, and how they end."""

from __future__ import annotations

import dataclasses

import pytest

import wisparse_jax as ws
from wisparse_jax.compile_clock import CompileClock
from wisparse_jax.errors import WisparseError
from wisparse_jax.inference import encode_prompt
from wisparse_jax.inference.text import Answer, StopTexts
from wisparse_jax.inference.timing import timed
from wisparse_jax.testing import count_compilations

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
    alone = ws.stream(demo, tokenizer, "In the morning the", max_new_tokens=40, stop=stop)  # no sequence of letters
    assert "".join(alone) == answer.text


def test_an_answer_ends_where_the_model_ends_it(demo, tokenizer):
    first, second = ws.generate(demo, [tokenizer.encode("In the morning the")], max_new_tokens=2)[0]
    ending = dataclasses.replace(demo.config, eos_token_ids=(second,))
    model = ws.Model(ending, demo.params)
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


def test_the_next_turns_of_a_conversation_compile_nothing(demo, chatting):
    """Up to the room that the first one has, at least; answers are those of the texts by themselves."""
    messages, lengths = [], []
    for turn, question in enumerate(["Hello.", "And the sea, how was it there?" * 5, "Why? " * 30]):
        messages.append({"role": "user", "content": question})
        with count_compilations() as compilations:
            answer = ws.stream(demo, chatting, messages, max_new_tokens=12)
            list(answer)
        assert turn == 0 or compilations.count == 0
        lengths.append(len(answer.prompt))
        assert answer.tokens == ws.generate(demo, [answer.prompt], max_new_tokens=12)[0]
        messages.append({"role": "assistant", "content": answer.text})
    # Buckets of their own, had they none with room to grow.
    assert lengths[0] < 32 and 64 < lengths[1] < 128 < lengths[2]


@pytest.mark.parametrize("prompt", ["Hello.", [{"role": "user", "content": "Hello."}]])
def test_an_answer_ends_at_the_end_of_the_tokenizer_too(demo, prompt):
    """Some models name the end of their turns there alone; a text that is continued ends where the model's does."""
    chatting = ws.load_tokenizer("demo")  # one to change
    chatting.inner.chat_template = TEMPLATE
    ids = encode_prompt(chatting, prompt)
    free = ws.generate(demo, [ids], max_new_tokens=20)[0]
    end = next(token for token in free[4:] if token not in free[:4])
    assert end not in demo.config.eos_token_ids
    chatting.inner.eos_token = chatting.inner.convert_ids_to_tokens(end)
    answer = ws.stream(demo, chatting, prompt, max_new_tokens=20)
    list(answer)
    assert answer.tokens == free[: free.index(end)] and answer.stop_reason == "end"
    # The configuration's still counts.
    first = dataclasses.replace(demo.config, eos_token_ids=(free[0],))
    assert list(ws.stream(ws.Model(first, demo.params), chatting, prompt, max_new_tokens=20)) == ["", ""]
    raw = chatting.encode("Hello.")
    continued = ws.generate(demo, [raw], max_new_tokens=20)[0]
    chatting.inner.eos_token = chatting.inner.convert_ids_to_tokens(continued[4])
    answer = ws.stream(demo, chatting, "Hello.", max_new_tokens=20, raw=True)
    list(answer)
    assert answer.tokens == continued


def test_a_content_in_parts_is_their_text(chatting):
    """As templates that know of parts write them, one after another; templates that do not would write Python."""
    parts = [{"type": "text", "text": "One "}, {"type": "text", "text": "two."}]
    given = [{"role": "user", "content": parts}]
    assert chatting.inner.decode(encode_prompt(chatting, given)) == "[user: One two.]>"
    assert given == [{"role": "user", "content": parts}]
    called = [{"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}]
    assert chatting.inner.decode(encode_prompt(chatting, called)).startswith("[assistant: ")  # the template's matter


@pytest.mark.parametrize(
    ("message", "refusal"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "content: expected parts .* 'image_url'",
        ),
        ({"role": "user", "content": ["Hello."]}, "content: expected parts .*, found Hello"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "content: expected parts"),
        (
            {"role": "user", "content": {"type": "text", "text": "Hello."}},
            "content: expected a text or a list of parts",
        ),
        ({"role": "user"}, "content: expected a text or a list of parts, found None"),
        ({"role": "assistant", "content": None}, "content: expected a text or a list of parts, found None"),
        ({"role": "user", "content": 5}, "content: expected a text or a list of parts, found 5"),
        ({"content": "Hello."}, "role: expected a text such as 'user', found None"),
    ],
)
def test_a_message_that_is_no_text_is_refused(chatting, message, refusal):
    """Templates would write the Python of it into the prompt, or nothing."""
    with pytest.raises(WisparseError, match=f"message 2: {refusal}"):
        encode_prompt(chatting, [{"role": "user", "content": "Hello."}, message])


def test_what_would_silently_be_something_else_is_refused(chatting):
    conversation = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello."}]
    with pytest.raises(WisparseError, match=r"raw: expected a text, .* found the messages of a conversation"):
        encode_prompt(chatting, conversation, raw=True)
    with pytest.raises(WisparseError, match="system: expected none beside the conversation's own system message"):
        encode_prompt(chatting, conversation, system="Be brief.")
    text = chatting.inner.decode(encode_prompt(chatting, conversation[1:], system="Be brief."))
    assert text == "[system: Be brief.][user: Hello.]>"


@pytest.mark.parametrize(
    ("template", "left_out"),
    [
        ("", "message 1, of the system"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "message 1, of the system"),
        ("{{ messages[0].content }}", "message 2, of the user"),
        # One for parts alone, of which a text has none.
        ("{% for m in messages %}{% for p in m.content if p.type %}{{ p.text }}{% endfor %}{% endfor %}", "message 1"),
    ],
)
def test_what_a_template_leaves_out_is_no_prompt(chatting, monkeypatch, template, left_out):
    monkeypatch.setattr(chatting.inner, "chat_template", template)
    with pytest.raises(WisparseError, match=f"the model's chat template leaves out {left_out}"):
        encode_prompt(chatting, "Hello.", system="Be kind.")
    known = "{% for m in messages if m.role in ['user', 'assistant'] %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(chatting.inner, "chat_template", known)
    for role in ("developer", "User"):
        with pytest.raises(WisparseError, match=f"leaves out message 2, of the {role}"):
            encode_prompt(chatting, [{"role": "user", "content": "A"}, {"role": role, "content": "Be kind."}])
    trimming = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    monkeypatch.setattr(chatting.inner, "chat_template", trimming)
    assert chatting.inner.decode(encode_prompt(chatting, " Hello.\n", system="Be kind. ")) == "Be kind.Hello."


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "Expected an expression"),
        ("{{ 1 // 0 }}", "integer division or modulo by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
        ("{% for i in range(100000000) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_fails_is_one_error(chatting, monkeypatch, template, reason):
    monkeypatch.setattr(chatting.inner, "chat_template", template)
    with pytest.raises(WisparseError, match=f"the model's chat template refuses the conversation: {reason}"):
        encode_prompt(chatting, "Hello.")


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


@pytest.mark.parametrize(
    ("pieces", "stop", "end", "text"),
    [
        ([["Seas"], [" and", 0, " the", " old"]], ["<|bos|>"], "stop", "Seas and"),
        ([["Seas"], [0], [" and"]], ["<|bos|>"], "stop", "Seas"),
        ([["Seas", 0, " and", " the"]], ["<|bos|> an"], "stop", "Seas"),  # a special token and what follows
        ([["Seas", " and", 0, " the"]], ["nd<|bos|>"], "stop", "Seas a"),  # and what stands before
        ([["Seas"], [0, 0], [" and"]], ["<|bos|><|bos|>"], "stop", "Seas"),
        ([["Seas"], [0, " and"], [0, " the"]], ["<|bos|><|bos|>", "<|other|>"], "length", "Seas and the"),
        ([["Seas"], [0, " and"]], ["<|eos|>"], "length", "Seas and"),  # nothing of it is shown
        ([["Seas"], [0, " and"]], [], "length", "Seas and"),
    ],
)
def test_a_stop_text_may_be_a_special_token(tokenizer, pieces, stop, end, text):
    def ids(piece):
        return [part for word in piece for part in ([word] if word == 0 else tokenizer.encode(word, bos=False))]

    encoded = [[ids(piece)] for piece in pieces]
    room = sum(len(piece) for [piece] in encoded)
    answer = Answer(tokenizer, tokenizer.encode("The"), iter(encoded), room, stop)
    assert "".join(answer) == answer.text == text and answer.stop_reason == end


def test_a_special_stop_ends_what_the_model_writes(demo, tokenizer):
    """The sixth token stands in for an end of turn that the configuration does not list."""
    prompt = "In the morning the"
    ids = tokenizer.encode(prompt)
    token = ws.generate(demo, [ids], max_new_tokens=6)[0][5]
    word = tokenizer.inner.convert_ids_to_tokens(token)
    before = ws.generate(demo, [ids], max_new_tokens=6)[0].index(token)
    from transformers import AddedToken

    other = ws.load_tokenizer("demo")
    other.inner.add_special_tokens({"additional_special_tokens": [AddedToken(word, special=True, normalized=False)]})
    stop = other.special(token)
    assert stop and tokenizer.special(token) == ""
    answer = ws.stream(demo, other, prompt, max_new_tokens=40, stop=[stop])
    expected = ws.generate(demo, [other.encode(prompt)], max_new_tokens=6)[0]
    assert "".join(answer) == other.decode(expected[:before], after=ids) and answer.stop_reason == "stop"
    assert len(answer.tokens) < 40


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
