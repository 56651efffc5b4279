"""Texts that the harness asks for: stops, seeds and settings of generation; skipped where it is not installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import wisparse_jax as ws
from wisparse_jax.cli import main
from wisparse_jax.errors import WisparseError
from wisparse_jax.inference import Sample

lm_eval = pytest.importorskip("lm_eval", reason="needs the eval extra: pip install 'wisparse-jax[eval]'")

# The harness and the libraries it loads data with are not ours to keep free of warnings.
pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = ["The old man said", "In the morning the", "She had never", "It was"]
SAMPLED = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}


@pytest.fixture(scope="module")
def tokenizer():
    return ws.load_tokenizer("demo")


def wrapped(model, tokenizer, **options):
    from wisparse_jax.harness import WisparseLM

    return WisparseLM(model, tokenizer, **options)


def request(prompt, asked):
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    return Instance(request_type="generate_until", doc={}, arguments=(prompt, asked), idx=0, metadata=("task", 0, 1))


def texts(lm, requests):
    return lm.generate_until(requests, disable_tqdm=True)


def ending(prompt, model, tokenizer):
    """The tokenizer with a special token that stands sixth in the model's greedy text, and what comes before it."""
    from transformers import AddedToken

    ids = tokenizer.inner.encode(prompt)
    written = ws.generate(model, [ids], max_new_tokens=6)[0]
    word = tokenizer.inner.convert_ids_to_tokens(written[5])
    other = ws.load_tokenizer("demo")
    other.inner.add_special_tokens({"additional_special_tokens": [AddedToken(word, special=True, normalized=False)]})
    before = written[: written.index(written[5])]
    return other, other.special(written[5]), other.inner.decode(before, skip_special_tokens=True), word


def test_repeats_are_texts_of_their_own(demo, tokenizer):
    """Self-consistency and pass@k count on it; the same run again gives the same."""
    lm = wrapped(demo, tokenizer, seed=3)
    asked = [request(PROMPTS[0], SAMPLED)] * 6
    found = texts(lm, asked)
    assert len(set(found)) >= 5 and texts(lm, asked) == found
    assert texts(wrapped(demo, tokenizer, seed=4), asked) != found
    greedy = texts(lm, [request(PROMPTS[0], {"until": [], "max_gen_toks": 12})] * 2)
    assert greedy[0] == greedy[1]


def test_a_text_depends_on_its_request_alone(demo, tokenizer):
    """Not on the batch, the order, or what else is asked for."""
    requests = [request(prompt, SAMPLED) for prompt in PROMPTS for _ in range(3)]
    found = texts(wrapped(demo, tokenizer, seed=3), requests)
    assert texts(wrapped(demo, tokenizer, seed=3, batch_size=5), requests) == found
    assert texts(wrapped(demo, tokenizer, seed=3, batch_size=2), requests[6:]) == found[6:]
    backwards = requests[9:] + requests[6:9] + requests[:6]
    assert texts(wrapped(demo, tokenizer, seed=3), backwards) == found[9:] + found[6:9] + found[:6]


def test_the_harness_own_seed_counts(demo, tokenizer):
    """`--seed` seeds NumPy's generator, whose state is left as it is."""
    lm, asked, found = wrapped(demo, tokenizer), [request(PROMPTS[0], SAMPLED)] * 2, []
    before = np.random.get_state()
    for seed in (1234, 1234, 7):
        np.random.seed(seed)
        found.append(texts(lm, asked))
        assert np.random.randint(10**6) == np.random.RandomState(seed).randint(10**6)
    np.random.set_state(before)
    assert found[0] == found[1] != found[2]


def test_settings_of_generation_are_honoured(demo, tokenizer):
    """A penalty changes a greedy text; min_p of 1 and top_p of 0 leave the most likely token, whatever is drawn."""
    lm = wrapped(demo, tokenizer)

    def expected(penalty):
        how = Sample(0.0, repetition_penalty=penalty)
        ids = ws.generate(demo, [tokenizer.inner.encode(PROMPTS[1])], 12, how)[0]
        return tokenizer.inner.decode(ids, skip_special_tokens=True)

    def found(**asked):
        return texts(lm, [request(PROMPTS[1], {"until": [], "max_gen_toks": 12, **asked})])[0]

    assert found(repetition_penalty=1.4) == expected(1.4) != expected(1.0)
    sampled = {"do_sample": True, "temperature": 1.5}
    assert found(**sampled, min_p=1.0) == found(**sampled, top_p=0) == found(**sampled, top_k=1) == expected(1.0)
    assert found(**sampled, min_p=1.0, repetition_penalty=1.4) == expected(1.4)
    assert found(**sampled, top_k=0) != expected(1.0)


@pytest.mark.parametrize(
    ("asked", "refusal"),
    [
        ({"num_beams": 4}, "num_beams = 4: not done here"),
        ({"max_length": 40}, "max_length = 40: expected max_gen_toks, the new tokens"),
        ({"do_sample": True}, "do_sample = True: expected a temperature above 0"),
        ({"max_gen_toks": 0}, "max_gen_toks = 0: expected 1 or above"),
        ({"max_gen_toks": 4096}, "max_gen_toks = 4096: expected 1 or above, with room for a prompt"),
        ({"temperature": "hot"}, "could not convert string to float: 'hot'"),
        ({"until": [5]}, r"until = \[5\]: expected texts"),
    ],
)
def test_others_are_refused_before_anything_is_generated(monkeypatch, demo, tokenizer, asked, refusal):
    from wisparse_jax import harness

    monkeypatch.setattr(harness, "token_stream", lambda *_: pytest.fail("something was generated"))
    requests = [request(PROMPTS[0], {"until": []}), request(PROMPTS[1], {"until": [], **asked})]
    with pytest.raises(WisparseError, match=f"task: generation_kwargs: {refusal}"):
        texts(wrapped(demo, tokenizer), requests)


def test_a_named_models_generation_config_counts(repository, tmp_path):
    from wisparse_jax.harness import WisparseLM

    folder = Path(shutil.copytree(repository / "wisparse_jax" / "demo_model", tmp_path / "model"))
    before = texts(WisparseLM(str(folder), dtype="float32"), [request(PROMPTS[1], {"max_gen_toks": 12})])
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | {"repetition_penalty": 1.4, "temperature": 0.6}))
    lm = WisparseLM(str(folder), dtype="float32")
    assert lm.get_model_info()["generation_config"] == {"repetition_penalty": 1.4, "temperature": 0.6}
    after = texts(lm, [request(PROMPTS[1], {"max_gen_toks": 12})])
    assert after != before
    assert texts(lm, [request(PROMPTS[1], {"max_gen_toks": 12, "repetition_penalty": 1.0})]) == before


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_stop_sequence_may_be_a_special_token(demo, tokenizer, batch_size):
    """Also in a batch, where other rows go on; what comes after it is no part of the text."""
    other, stop, text, _ = ending(PROMPTS[1], demo, tokenizer)
    lm = wrapped(demo, other, batch_size=batch_size)
    requests = [request(prompt, {"until": [stop, "never there"], "max_gen_toks": 12}) for prompt in PROMPTS[:2]]
    assert texts(lm, requests)[1] == text
    open_end = texts(lm, [request(PROMPTS[1], {"until": ["never there"], "max_gen_toks": 12})])[0]
    assert open_end.startswith(text) and open_end != text


def test_the_tokenizers_end_of_sequence_stops_where_nothing_else_is_asked(demo, tokenizer):
    """50 task files say `until: []`; the configuration of this model has another end of sequence."""
    other, _, text, word = ending(PROMPTS[1], demo, tokenizer)
    other.inner.eos_token = word
    assert other.inner.eos_token_id not in demo.config.eos_token_ids
    lm = wrapped(demo, other)
    for until in ([], None, ""):
        assert texts(lm, [request(PROMPTS[1], {"until": until, "max_gen_toks": 12})]) == [text]


def test_a_template_that_refuses_system_messages_gets_none(demo, tokenizer, monkeypatch, caplog):
    """As with the harness's own model: a warning, once; other refusals are one error."""
    refusing = "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no ' + m.role) }}{% endif %}"
    monkeypatch.setattr(tokenizer.inner, "chat_template", refusing + "[{{ m.content }}]{% endfor %}")
    lm, question = wrapped(demo, tokenizer), {"role": "user", "content": "Hello."}
    with caplog.at_level("WARNING"):
        for _ in range(2):
            assert lm.apply_chat_template([{"role": "system", "content": "Be kind."}, question]) == "[Hello.]"
    assert [r.message for r in caplog.records if "no system; system messages are left out" in r.message] != []
    with pytest.raises(WisparseError, match="the model's chat template refuses the conversation: no assistant"):
        lm.apply_chat_template([question, {"role": "assistant", "content": "Hi."}])
    monkeypatch.setattr(tokenizer.inner, "chat_template", None)
    with pytest.raises(WisparseError, match="the model has no chat template"):
        lm.apply_chat_template([question])


def test_code_of_data_sets_may_be_trusted(demo, tokenizer):
    """The harness hands `--trust_remote_code` to the model, too; no code of a model ever runs."""
    assert texts(wrapped(demo, tokenizer, trust_remote_code=True), []) == []


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--limit", "-1"], "limit = -1: expected a number above 0, below 1 a share of the documents"),
        (["-L", "0"], "limit = 0: expected a number above 0"),
        (["--limit=nan"], "limit = nan: expected a number above 0"),
        (["--samples", "x"], "samples = x: not readable as JSON, nor a file"),
        (["--samples", "[1]"], 'samples = [1]: expected such as {"task": [0, 1]}'),
        (["--metadata", "{bad"], "lm-evaluation-harness: Invalid JSON: {bad"),
        (["--log_samples"], "lm-evaluation-harness: Specify --output_path if providing --log_samples"),
        (["--fewshot_as_multiturn"], "lm-evaluation-harness: When `fewshot_as_multiturn` is True"),
    ],
)
def test_options_that_the_harness_would_stumble_over_are_one_line(capsys, options, line):
    with pytest.raises(SystemExit) as caught:
        main(["lm-eval", "--model_args", "pretrained=demo", "--tasks", "arc_easy", *options])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.splitlines()[-1].startswith(f"wisparse: error: {line}")
    assert "Traceback" not in err


@pytest.mark.parametrize("error", [KeyError("answer"), ValueError("not a number")])
def test_what_fails_in_a_task_is_no_defect_of_ours_and_keeps_its_traceback(monkeypatch, capsys, error):
    import lm_eval.__main__ as harness  # pyright: ignore[reportMissingImports]

    def process_results():
        raise error

    monkeypatch.setattr(harness, "cli_evaluate", process_results)
    with pytest.raises(SystemExit) as caught:
        main(["lm-eval", "--tasks", "mine"])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and "in process_results" in err
    assert "lm-evaluation-harness, or a task of it, failed" in err.splitlines()[-1]


def test_what_fails_in_this_package_is_a_defect_of_it(monkeypatch, capsys, demo, tokenizer):
    import lm_eval.__main__ as harness  # pyright: ignore[reportMissingImports]

    lm = wrapped(demo, tokenizer)
    monkeypatch.setattr(lm, "tokenizer", None)
    monkeypatch.setattr(harness, "cli_evaluate", lambda: lm.tok_encode("Seas"))
    with pytest.raises(SystemExit) as caught:
        main(["lm-eval", "--tasks", "mine"])
    err = capsys.readouterr().err
    assert caught.value.code == 1 and "this is a defect of wisparse" in err and "Traceback" in err
