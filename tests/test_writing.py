"""The commands that write text: many prompts, JSON, conversations, and what they say on standard error."""

import io
import json
import re
import threading

import jax
import pytest

from wisparse_jax.cli import main
from wisparse_jax.errors import WeightsError
from wisparse_jax.models import loading

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def chatting(monkeypatch):
    """The demo model's tokenizer with a chat template."""
    real = loading.load_tokenizer

    def load(name):
        tokenizer = real(name)
        tokenizer.inner.chat_template = TEMPLATE
        return tokenizer

    monkeypatch.setattr(loading, "load_tokenizer", load)


def generate(capsys, *options):
    main(["generate", "demo", "--max-new-tokens", "6", *options])
    return capsys.readouterr()


def refused(capsys, *command):
    with pytest.raises(SystemExit) as caught:
        main(list(command))
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    return err.strip().splitlines()[-1].removeprefix("wisparse: error: ")


def test_the_times_are_a_line_on_standard_error(capsys):
    out, err = generate(capsys, "--prompt", "Seas")
    assert out.startswith("Seas") and out.endswith("\n")
    line = r"load \d+\.\d s, compile \d+\.\d s, first token \d+\.\d\d s, 6 tokens, \d+\.\d tok/s"
    line += r"; ended by --max-new-tokens\n"
    assert re.fullmatch(line, err)


def test_integer_weights_on_a_cpu_are_widened_and_that_is_said(capsys):
    out, err = generate(capsys, "--prompt", "Seas", "--weights", "int8", "--head", "int8")
    told = "integer weights are widened to float32 once, as a CPU is faster so" in err.splitlines()
    assert told == (jax.default_backend() == "cpu")
    assert out == generate(capsys, "--prompt", "Seas", "--weights", "int8", "--head", "int8")[0]
    assert "integer" not in generate(capsys, "--prompt", "Seas")[1]


def test_prompts_of_a_file_are_answered_one_by_one(capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("Seas\n\nThe old man\n")
    out, _ = generate(capsys, "--prompts", str(tmp_path / "prompts.txt"))
    singles = [generate(capsys, "--prompt", text)[0] for text in ("Seas", "The old man")]
    assert out == "---\n".join(singles)


def test_prompts_end_where_lines_do(capsys, tmp_path):
    text = '\ufeff{"prompt": "Seas\u2028and"}\r\n\n{"prompt": "The\x85old"}\n'
    (tmp_path / "prompts.jsonl").write_text(text, encoding="utf-8", newline="")
    out, _ = generate(capsys, "--prompts", str(tmp_path / "prompts.jsonl"), "--json")
    assert [json.loads(line)["prompt"] for line in out.split("\n")[:-1]] == ["Seas\u2028and", "The\x85old"]


@pytest.mark.parametrize("value", ["[" * 10_000 + "]" * 10_000, "9" * 6_000, '"\\ud800"'], ids=["deep", "long", "half"])
def test_prompts_that_are_hostile_json_are_a_line(capsys, tmp_path, value):
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "Seas"}}\n\n{{"prompt": "x", "more": {value}}}\n')
    line = refused(capsys, "generate", "demo", "--prompts", str(tmp_path / "prompts.jsonl"))
    assert "prompts.jsonl: line 3: not readable as JSON" in line and len(line) < 300


def test_json_is_an_object_a_prompt(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "Seas"}\n{"prompt": "The old man"}\n'))
    out, err = generate(capsys, "--prompts", "-", "--json")
    first, second = map(json.loads, out.splitlines())
    assert err == "" and first["prompt"] == "Seas" and second["prompt"] == "The old man"
    assert generate(capsys, "--prompt", "Seas")[0] == "Seas" + first["text"] + "\n"
    assert first["new_tokens"] == 6 and first["stop_reason"] == "length" and first["prompt_tokens"] == 4
    assert first["seconds"] >= first["first_token_seconds"] > 0 and first["tokens_per_second"] > 0
    whole = first["text"]
    out, _ = generate(capsys, "--prompt", "Seas", "--json", "--stop", whole[3:5], "--stop", "never there")
    stopped = json.loads(out)
    assert stopped["text"] == whole[: whole.index(whole[3:5])] and stopped["stop_reason"] == "stop"


def test_a_chat_template_is_applied_unless_raw(capsys, chatting):
    out, _ = generate(capsys, "--prompt", "Seas", "--json", "--system", "Be brief.")
    asked = json.loads(out)
    raw = json.loads(generate(capsys, "--prompt", "Seas", "--json", "--raw")[0])
    assert asked["prompt_tokens"] > raw["prompt_tokens"] == 4
    assert generate(capsys, "--prompt", "Seas", "--system", "Be brief.")[0] == asked["text"] + "\n"  # the answer alone


def test_a_conversation_remembers(capsys, chatting, monkeypatch):
    """What the second question is asked with holds the first and its answer; /reset forgets."""
    from wisparse_jax.inference import text

    asked = []
    real = text.encode_prompt
    monkeypatch.setattr(text, "encode_prompt", lambda *args: asked.append([*args[1]]) or real(*args))
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\n\nAnd you?\n/reset\nAgain.\n/quit\nNever.\n"))
    main(["chat", "demo", "--max-new-tokens", "4", "--system", "Be kind."])
    out, err = capsys.readouterr()
    system, first, second, again = (
        {"role": role, "content": content}
        for role, content in [("system", "Be kind."), ("user", "Hello."), ("user", "And you?"), ("user", "Again.")]
    )
    answer = asked[1][2]
    assert asked == [[system, first], [system, first, answer, second], [system, again]]
    assert answer["role"] == "assistant" and err.count("first token") == 3
    assert out.startswith(answer["content"] + "\n") and out.endswith("\n")  # of what is piped, an answer a line
    assert err.startswith("/reset starts anew, /quit leaves\n") and err.count("a new conversation\n") == 1


@pytest.mark.parametrize("command", ["chat demo", "generate demo --prompt x"])
def test_an_answer_that_never_fits_is_refused_at_once(capsys, chatting, monkeypatch, command):
    """While the weights are still being read."""
    refusal, waited = threading.Event(), []
    monkeypatch.setattr(loading, "load", lambda *_, **__: waited.append(refusal.wait(60)))
    line = refused(capsys, *command.split(), "--max-new-tokens", "512")
    assert "with 512 new ones it exceeds the context of 512" in line and not waited
    refusal.set()


def test_weights_are_read_while_the_tokenizer_is_loaded(capsys, monkeypatch):
    begun, load, load_tokenizer = threading.Event(), loading.load, loading.load_tokenizer
    monkeypatch.setattr(loading, "load", lambda *args, **how: begun.set() or load(*args, **how))
    monkeypatch.setattr(loading, "load_tokenizer", lambda name: begun.wait(60) and load_tokenizer(name))
    out, _ = generate(capsys, "--prompt", "Seas")
    assert out.startswith("Seas") and len(out) > len("Seas\n")


def test_weights_that_cannot_be_read_are_a_line(capsys, monkeypatch):
    def load(*_, **__):
        raise WeightsError("model.safetensors: damaged")

    monkeypatch.setattr(loading, "load", load)
    assert refused(capsys, "generate", "demo", "--prompt", "x") == "model.safetensors: damaged"


def test_a_conversation_too_long_can_be_begun_anew(capsys, chatting, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 600 + "\nHello.\n"))
    main(["chat", "demo", "--max-new-tokens", "2"])
    err = capsys.readouterr().err
    assert "it exceeds the context of 512; /reset starts anew" in err and err.count("first token") == 1


def test_a_broken_line_of_a_strict_terminal_is_refused_and_the_next_is_answered(capsys, chatting, monkeypatch):
    typed = io.BytesIO(b"Hello \xff.\n\xe2\x82\nHello.\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, encoding="utf-8", errors="strict"))
    main(["chat", "demo", "--max-new-tokens", "2"])
    err = capsys.readouterr().err
    assert err.count("not UTF-8 text") == 2 and err.count("first token") == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "UTF8"])
def test_json_is_json_in_any_encoding(capsys, monkeypatch, encoding):
    """Read as UTF-8, as JSON is: codes that stand for what an encoding lacks would be no JSON."""
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding))
    main(["generate", "demo", "--max-new-tokens", "2", "--prompt", "é ☃ 𝄞", "--json"])
    line = written.getvalue().decode("utf-8")
    assert json.loads(line)["prompt"] == "é ☃ 𝄞" and (line.isascii() or encoding.lower() in ("utf-8", "utf8"))


def test_an_answer_of_no_token_is_told(capsys, chatting, monkeypatch):
    from wisparse_jax.inference import text

    monkeypatch.setattr(text, "token_stream", lambda *_, **__: iter([[[]]]))
    out, err = generate(capsys, "--prompt", "Seas")
    assert out == "\n" and err.startswith("the model ended its answer before the first token\n")


def test_what_cannot_be_asked_is_refused(capsys, tmp_path):
    bad = {
        "": "expected either --prompt TEXT or --prompts FILE",
        "--prompt x --prompts y": "expected either --prompt TEXT or --prompts FILE",
        "--prompts {f}/none": f"{tmp_path}/none: no such file",
        "--prompts {f}/empty": f"{tmp_path}/empty: expected a prompt a line, found none",
        "--prompts {f}/bad.jsonl": f"{tmp_path}/bad.jsonl: line 2: not readable as JSON",
        "--prompts {f}/other.jsonl": f"{tmp_path}/other.jsonl: line 1: expected an object with a text `prompt`",
        "--prompt x --system y": "system: expected no system message",
    }
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"prompt"\n')
    (tmp_path / "other.jsonl").write_text('{"text": "x"}\n')
    for options, message in bad.items():
        words = [word.format(f=tmp_path) for word in options.split()]
        assert refused(capsys, "generate", "demo", *words).startswith(message)
    assert refused(capsys, "chat", "demo").startswith("demo: the model has no chat template")


def test_a_prompt_of_a_file_that_is_refused_is_named(capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Seas"}\n{"messages": [{"role": "user", "content": "Hello."}]}\n')
    line = refused(capsys, "generate", "demo", "--prompts", str(file))
    assert line == f"{file}: prompt 2 of 2: messages: expected a text, as the model has no chat template"


def test_what_ended_a_text_is_told(capsys):
    _, err = generate(capsys, "--prompt", "The sea was", "--stop", "e")
    assert err.strip().endswith("; ended by --stop")
