"""lm-evaluation-harness on the demo model; skipped where the harness is not installed."""

from __future__ import annotations

import json
import lzma
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from record_harness import BLIMP_PAIRS, FIXTURE, PAIRS, read_pairs, run_task, scored, write_task

import wisparse_jax as ws
from wisparse_jax.cli import main
from wisparse_jax.errors import WisparseError
from wisparse_jax.search import SearchSettings

lm_eval = pytest.importorskip("lm_eval", reason="needs the eval extra: pip install 'wisparse-jax[eval]'")

# The harness and the libraries it loads data with are not ours to keep free of warnings.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tokenizer():
    return ws.load_tokenizer("demo")


@pytest.fixture(scope="module")
def sparse(demo, demo_text):
    plan = ws.calibrate(
        demo, demo_text["calibration"][:2], 0.5, "uniform", settings=SearchSettings(tokens=1024, compare_teal=False)
    )
    return ws.apply(demo, plan)


@pytest.fixture(scope="module")
def lm(sparse, tokenizer):
    from wisparse_jax.harness import WisparseLM

    return WisparseLM(sparse, tokenizer)


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """Nothing is left in the user's own caches."""
    patch = pytest.MonkeyPatch()
    import datasets.config  # pyright: ignore[reportMissingImports]

    folder = str(tmp_path_factory.mktemp("datasets"))
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    yield
    patch.undo()


def log_likelihoods(model, tokenizer, texts):
    """Of texts after BOS, every token sparse but BOS."""
    from wisparse_jax.evaluation.log_likelihood import Request, score_continuations

    bos = [tokenizer.inner.bos_token_id]
    return [
        score for score, _ in score_continuations(model, [Request(bos, tokenizer.encode(t, bos=False)) for t in texts])
    ]


def test_a_task_scores_the_models_own_log_likelihoods(lm, sparse, tokenizer, tmp_path):
    results = run_task(lm, write_task(tmp_path, PAIRS))
    # The harness puts a space between a question and its choices, also where there is no question.
    texts = [f" {text}" for pair in PAIRS for text in pair]
    # In one batch, as the harness has them: another's rounding may take a channel across its threshold.
    expected = np.reshape(log_likelihoods(sparse, tokenizer, texts), (len(PAIRS), 2))
    samples = sorted(results["samples"]["pairs"], key=lambda sample: sample["doc_id"])
    found = [[float(response[0][0]) for response in sample["resps"]] for sample in samples]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert results["results"]["pairs"]["acc,none"] == np.mean([good > bad for good, bad in expected])


def test_the_results_state_how_the_model_ran(lm, tmp_path):
    config = run_task(lm, write_task(tmp_path, PAIRS[:1]))["config"]
    stated = {key: config[key] for key in ("sparse_method", "sparsity", "sparse_prefill", "model_dtype")}
    assert stated == {"sparse_method": "uniform", "sparsity": 0.5, "sparse_prefill": 0.5, "model_dtype": "float32"}


def test_a_dense_model_scores_its_logits(demo, tokenizer, tmp_path):
    from wisparse_jax.harness import WisparseLM

    lm = WisparseLM(demo, tokenizer)

    def expected(ids):
        log_probs = jax.nn.log_softmax(demo(jnp.array([ids]))[0, :-1])
        return pytest.approx(
            float(np.take_along_axis(np.asarray(log_probs), np.array(ids[1:])[:, None], 1).sum()), abs=1e-3
        )

    text, bos = PAIRS[0][0], tokenizer.inner.bos_token_id
    scored = lm.loglikelihood([instance("loglikelihood", ("", text))], disable_tqdm=True)
    assert scored[0][0] == expected([bos, *tokenizer.encode(text, bos=False)])
    # The harness begins with BOS, and encodes a text as the tokenizer does, here with BOS too.
    rolling = lm.loglikelihood_rolling([instance("loglikelihood_rolling", (text,))], disable_tqdm=True)
    assert rolling == [expected([bos, *tokenizer.inner.encode(text)])]
    assert "sparsity" not in lm.get_model_info()


def instance(kind, arguments):
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_a_text_longer_than_the_context_is_scored_in_windows(demo, tokenizer):
    """Each token once: more text is less likely, and a token costs no more than a random guess would."""
    from wisparse_jax.harness import WisparseLM

    lm = WisparseLM(demo, tokenizer, max_length=32)
    text = " ".join(good for good, _ in PAIRS * 5)
    count = len(tokenizer.encode(text, bos=False))
    short, long = lm.loglikelihood_rolling(
        [instance("loglikelihood_rolling", (part,)) for part in (text[: len(text) // 2], text)], disable_tqdm=True
    )
    assert count > 96 and long < short < 0 and -long / count < np.log(demo.config.vocab_size)


def test_generation_stops_where_the_task_says(lm, sparse, tokenizer):
    prompts = ["The old man said", "In the morning the"]
    whole = [
        tokenizer.decode(ws.generate(sparse, [tokenizer.inner.encode(prompt)], max_new_tokens=24)[0])
        for prompt in prompts
    ]
    stop = whole[0][12:14]
    asked = {"until": [stop], "max_gen_toks": 24, "do_sample": False}
    found = lm.generate_until([instance("generate_until", (p, asked)) for p in prompts], disable_tqdm=True)
    assert found == [text.split(stop)[0] for text in whole] and stop not in found[0] and len(found[0]) > 0


def test_a_conversation_is_the_templates(lm, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer.inner, "chat_template", "{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert lm.apply_chat_template([{"role": "user", "content": "Hello."}]) == "[Hello.]"
    assert lm.chat_template(True) == tokenizer.inner.chat_template


def test_the_command_prints_the_harness_table(sparse, tmp_path, capsys):
    sparse.plan.save(tmp_path / "plan")
    folder = write_task(tmp_path, PAIRS)
    before = list(sys.argv)
    where = ["--include_path", str(folder), "--output_path", str(tmp_path / "results.json")]
    model = f"pretrained=demo,plan={tmp_path / 'plan'},dtype=float32"
    main(["lm-eval", "--model_args", model, "--tasks", "pairs", *where])
    out = capsys.readouterr().out
    assert "wisparse ({'pretrained': 'demo'" in out and "|pairs|" in out and sys.argv == before
    (written,) = tmp_path.glob("results*.json")
    assert json.loads(written.read_text())["config"]["sparse_prefill"] == 0.5


def test_evaluate_has_a_short_form(monkeypatch, sparse, tmp_path, capsys):
    """The same command line as somebody would give the harness."""
    from wisparse_jax.commands import lm_eval as command

    given = []
    monkeypatch.setattr(command, "run_harness", given.append)
    sparse.plan.save(tmp_path / "plan")
    main(["evaluate", "demo", "--tasks", "blimp,arc_easy"])
    main(["evaluate", "demo", "--tasks", "blimp", "--plan", str(tmp_path / "plan"), "--sparse-prefill", "0.25"])
    plain, full = given
    assert plain == ["run", "--model_args", "pretrained=demo", "--tasks", "blimp,arc_easy"]
    assert full[2:5] == ["pretrained=demo", f"plan={tmp_path / 'plan'}", "sparse_prefill=0.25"]
    for wrong in ([], ["--tasks", "blimp", "--text", "self"]):
        with pytest.raises(SystemExit):
            main(["evaluate", "demo", *wrong])
        assert "expected either --text FILE or --tasks NAMES" in capsys.readouterr().err


def test_a_missing_harness_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit) as caught:
        main(["lm-eval", "--tasks", "x"])
    assert caught.value.code == 2 and "pip install 'wisparse-jax[eval]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ValueError("Tasks not found: blimpp"),
            "tasks: blimpp not found: expected some of those that `wisparse",
        ),
        (
            ConnectionError("Couldn't reach 'x' on the Hub"),
            "Couldn't reach 'x' on the Hub: a task's data come",
        ),
        (FileNotFoundError("Unable to find 'a.jsonl'\nat all"), "lm-evaluation-harness: Unable to find 'a.jsonl'\n"),
    ],
)
def test_what_a_task_lacks_is_one_line(monkeypatch, capsys, error, line):
    import lm_eval.__main__ as harness  # pyright: ignore[reportMissingImports]

    def fails():
        raise error

    monkeypatch.setattr(harness, "cli_evaluate", fails)
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "demo", "--tasks", "blimpp"])
    assert caught.value.code == 2 and line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            "pretrained=demo,sparse_prefil=0.5",
            "sparse_prefil is not known: expected some of pretrained, tokenizer,",
        ),
        ("plan=plan", "pretrained: expected a model, found nothing"),
    ],
)
def test_arguments_that_the_model_does_not_take_are_one_line(capsys, tmp_path, arguments, reason):
    where = ["--include_path", str(write_task(tmp_path, PAIRS))]
    with pytest.raises(SystemExit) as caught:
        main(["lm-eval", "--model_args", arguments, "--tasks", "pairs", *where])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and line.startswith(f"wisparse: error: model_args: {reason}")


def test_a_reader_that_goes_away_is_not_the_hub(monkeypatch, capsys):
    import lm_eval.__main__ as harness  # pyright: ignore[reportMissingImports]

    def fails():
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(harness, "cli_evaluate", fails)
    with pytest.raises(SystemExit) as caught:
        main(["lm-eval", "ls", "tasks"])
    assert caught.value.code == 141 and "hub" not in capsys.readouterr().err


def test_a_loaded_model_needs_its_tokenizer(sparse, tokenizer):
    from wisparse_jax.harness import WisparseLM

    for arguments in ({}, {"tokenizer": tokenizer, "plan": "plan"}):
        with pytest.raises(WisparseError, match="a loaded model: expected its tokenizer beside it, and no plan"):
            WisparseLM(sparse, **arguments)


DATA = os.environ.get("WISPARSE_DATA")


def assert_agrees(lm, pairs, recorded):
    """Same accuracy, every log-likelihood within 1e-3 of what the harness's own model says in float32."""
    found = scored(lm, pairs)
    np.testing.assert_allclose(found["log_likelihoods"], recorded["log_likelihoods"], rtol=0, atol=1e-3)
    assert found["accuracy"] == recorded["accuracy"]


def test_the_dense_model_agrees_with_the_harness_own(demo, tokenizer, repository):
    """Recorded once with torch, by scripts/record_harness.py."""
    from wisparse_jax.harness import WisparseLM

    recorded = json.loads((repository / FIXTURE).read_text())
    assert_agrees(WisparseLM(demo, tokenizer), PAIRS, recorded["ours"])


@pytest.mark.skipif(DATA is None, reason="WISPARSE_DATA names no folder with blimp.jsonl.xz")
def test_blimp(lm, demo, tokenizer, tmp_path):
    """The demo model knows agreement in number; half of its channels know most of it."""
    from wisparse_jax.harness import WisparseLM

    with lzma.open(Path(str(DATA)) / "blimp.jsonl.xz", "rt") as file:
        rows = [json.loads(line) for line in file]
    pairs = [(r["sentence_good"], r["sentence_bad"]) for r in rows if r["UID"] == "anaphor_number_agreement"][:200]
    folder = write_task(tmp_path, pairs, "blimp")
    dense = run_task(WisparseLM(demo, tokenizer), folder, "blimp")["results"]["blimp"]["acc,none"]
    sparse = run_task(lm, folder, "blimp")["results"]["blimp"]["acc,none"]
    assert dense > 0.8 and sparse > 0.65


@pytest.mark.skipif(DATA is None, reason="WISPARSE_DATA names no folder with blimp.jsonl.xz")
def test_blimp_agrees_with_the_harness_own(demo, tokenizer, repository):
    from wisparse_jax.harness import WisparseLM

    recorded = json.loads((repository / FIXTURE).read_text())
    pairs = read_pairs(Path(str(DATA)) / "blimp.jsonl.xz", BLIMP_PAIRS)
    assert_agrees(WisparseLM(demo, tokenizer), pairs, recorded["blimp"])
