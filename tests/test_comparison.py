"""What the comparison of methods computes itself: sparsity at a perplexity, parts of texts, BLiMP's likelihoods."""

import dataclasses
import json
import lzma
import math
import types

import blimp_of_plans
import compare_methods
import jax.numpy as jnp
import numpy as np
import pytest
from blimp import log_likelihoods, read_pairs
from comparison_report import sparsity_at
from comparison_texts import read_text
from comparison_variants import ABLATIONS, GROUPS, variants_of

import wisparse_jax as ws
from wisparse_jax.calibration import SearchSettings
from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.rules import ChannelRule
from wisparse_jax.report.comparison import read_rows
from wisparse_jax.search.pipeline import resolve
from wisparse_jax.sparsity import SparseLlama


def test_the_sparsity_at_an_increase_of_perplexity():
    """Logarithms are interpolated, from the dense model at 0 on."""
    points = [(0.4, 20.0), (0.6, 80.0)]
    assert sparsity_at(points, 10.0, 1.0) == pytest.approx(0.4)
    assert sparsity_at(points, 10.0, math.sqrt(2) - 1) == pytest.approx(0.2)
    assert sparsity_at(points, 10.0, 3.0) == pytest.approx(0.5)
    assert math.isnan(sparsity_at(points, 10.0, 9.0))


def test_a_part_of_a_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("abcdef")
    assert [read_text(f"a={file}{part}") for part in ("", "@:2", "@2:", "@1:3")] == ["abcdef", "ab", "cdef", "bc"]
    with pytest.raises(WisparseError, match="expected name=FILE"):
        read_text("a.txt")


def test_every_ablation_is_a_method_that_the_search_takes():
    for variant in variants_of(("teal",), GROUPS, ("greedy", "paper"), "wisparse-plus"):
        method = resolve(variant.method, dataclasses.replace(SearchSettings(), **variant.switches))  # pyright: ignore[reportArgumentType]
        for part, value in variant.switches.items():
            assert getattr(method, part) == {"on": True, "off": False}.get(value, value)
    assert len({variant.name for variant in ABLATIONS}) == len(ABLATIONS)
    with pytest.raises(WisparseError, match="methods: 'no'"):
        variants_of(("no",), (), (), "uniform")
    with pytest.raises(WisparseError, match="methods, ablations and allocators: expected one at least, found none"):
        variants_of((), (), (), "uniform")


def test_plans_are_scored_on_other_text_than_they_are_made_of(tmp_path, monkeypatch, tiny_model):
    """Sampled text of the calibration's seed would be the calibration text."""
    seeds = []
    monkeypatch.setattr(compare_methods.ws, "load", lambda *_: tiny_model)
    monkeypatch.setattr(compare_methods.ws, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(compare_methods, "read_windows", lambda *args: seeds.append(args[-1]))
    arguments = compare_methods.Arguments("tiny", tmp_path / "out", seeds=(0, 1, 2))
    comparison = compare_methods.Comparison(arguments)
    monkeypatch.setattr(comparison, "_compare", lambda *_: None)
    monkeypatch.setattr(compare_methods, "write_summary", lambda out, *_: (out / "summary.md").write_text(""))
    comparison.run()
    scored, *calibrated = seeds
    assert scored not in calibrated and calibrated == [0, 1, 2]
    with pytest.raises(WisparseError, match=f"seeds: {scored} is that of the texts"):
        compare_methods.Comparison(dataclasses.replace(arguments, out=tmp_path / "other", seeds=(0, scored)))


def test_a_stopped_comparison_goes_on_to_the_same_rows(tmp_path, monkeypatch, tiny_model, tiny_tokens):
    """Stopped in its second seed: what is finished is not calibrated again, and another command is refused."""
    (tmp_path / "settings.yaml").write_text("tokens: 64\nstatistics_tokens: 64\n")
    monkeypatch.setattr(compare_methods.ws, "load", lambda *_: tiny_model)
    monkeypatch.setattr(compare_methods.ws, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(compare_methods, "read_windows", lambda *_: np.asarray(tiny_tokens))
    given = {"methods": ("uniform", "wina"), "seeds": (0, 1), "config": tmp_path / "settings.yaml"}
    made, calibrate = [], compare_methods.ws.calibrate_targets

    def stopping(*args):
        made.append((args[3], args[4]))  # method and seed
        if len(made) == 4:
            raise KeyboardInterrupt
        return calibrate(*args)

    monkeypatch.setattr(compare_methods.ws, "calibrate_targets", stopping)
    stopped = compare_methods.Arguments("tiny", tmp_path / "stopped", **given)
    (tmp_path / "stopped").mkdir()  # as a run leaves it that is killed at its very beginning
    (tmp_path / "stopped" / "run.json.new").write_text("{")
    with pytest.raises(KeyboardInterrupt):
        compare_methods.Comparison(stopped).run()
    with pytest.raises(WisparseError, match=f"{tmp_path}/stopped: holds another comparison"):
        compare_methods.Comparison(dataclasses.replace(stopped, sparsities=(0.4,)))
    compare_methods.Comparison(stopped).run()
    assert made == [("uniform", 0), ("wina", 0), ("uniform", 1), ("wina", 1), ("wina", 1)]
    compare_methods.Comparison(dataclasses.replace(stopped, out=tmp_path / "whole")).run()
    for name in ("comparison.csv", "layers.csv"):
        found, expected = (read_rows([tmp_path / one], [name]) for one in ("stopped", "whole"))
        kept = [[{k: v for k, v in row.items() if "seconds" not in k} for row in rows] for rows in (found, expected)]
        assert kept[0] == kept[1] and len(found) in (4, 4 * tiny_model.config.num_blocks * len(LAYERS))
    assert not (tmp_path / "stopped" / "searches").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"calibrate": ("a=x@:9", "a=x@9:")}, "calibrate: expected at least one, and none twice, found a, a"),
        ({"evaluate": ("self", "self")}, "evaluate: expected at least one, and none twice"),
        ({"calibrate": ("a b=x",)}, "'a b': expected a name of letters"),
        ({"calibrate": ("../a=x",)}, "'../a': expected a name of letters"),
        ({"seeds": (0, 0)}, "seeds: expected at least one, and none twice, found 0, 0"),
        ({"sparsities": (0.5, 0.5000001)}, "sparsities: expected at least one, and none twice, found 0.5, 0.5"),
    ],
)
def test_what_would_share_a_folder_is_refused(tmp_path, given, said):
    with pytest.raises(WisparseError, match=said):
        compare_methods.Comparison(compare_methods.Arguments("tiny", tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


def test_a_comparison_of_a_text_that_has_changed_is_another(tmp_path, monkeypatch, tiny_model, tiny_tokens):
    text, calibrated = tmp_path / "text.txt", []
    text.write_text("as it was")
    monkeypatch.setattr(compare_methods.ws, "load", lambda *_: tiny_model)
    monkeypatch.setattr(compare_methods.ws, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(compare_methods, "read_windows", lambda *_: np.asarray(tiny_tokens))
    calibrate = compare_methods.ws.calibrate_targets
    monkeypatch.setattr(
        compare_methods.ws, "calibrate_targets", lambda *args: [calibrated.append(args[4]), calibrate(*args)][1]
    )
    # A name that reads as a number is a name all the same.
    arguments = compare_methods.Arguments("tiny", tmp_path / "out", (f"007={text}",), methods=("uniform",))
    compare_methods.Comparison(arguments).run()
    compare_methods.Comparison(arguments).run()
    assert calibrated == [0]
    text.write_text("as it is")
    with pytest.raises(WisparseError, match=f"{tmp_path}/out: holds another comparison: other arguments, texts"):
        compare_methods.Comparison(arguments)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(WisparseError, match=f"{tmp_path}/other: exists already, and holds no comparison"):
        compare_methods.Comparison(dataclasses.replace(arguments, out=tmp_path / "other"))


def test_likelihoods_of_padded_sentences_are_those_of_each_by_itself(tiny_model):
    """Each sentence evaluated alone, without padding, its second half sparse with biases."""
    config, rng = tiny_model.config, np.random.default_rng(0)
    shapes = config.layer_shapes
    rules = [
        {n: ChannelRule(jnp.full(shapes[n][0], 0.3), jnp.linspace(0, 0.2, shapes[n][1])) for n in LAYERS}
        for _ in range(config.num_blocks)
    ]
    plan = SparseLlama(config, tiny_model.params, rules)
    sentences = [rng.integers(2, 97, length).tolist() for length in (10, 6)]
    found = log_likelihoods(tiny_model, sentences, {"plan": plan})
    for row, ids in enumerate(sentences):
        alone = ws.evaluate(tiny_model, np.array([ids]), {"plan": plan})
        logits = np.asarray(tiny_model(np.array([ids])), np.float64)[0, :-1]
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        dense = log_p[np.arange(len(ids) - 1), ids[1:]]
        first = dense[: len(ids) // 2].sum()
        assert found["dense"][row] == pytest.approx(dense.sum(), rel=1e-5)
        assert found["plan"][row] == pytest.approx(
            first - alone.sparse["plan"].nll[0] * alone.scored_positions, rel=1e-5
        )
    assert (np.abs(found["plan"] - found["dense"]) > 0.1).all()


def test_pairs_are_spaced_over_the_file(tmp_path):
    file = tmp_path / "pairs.jsonl.xz"
    lines = [f'{{"sentence_good": "good {i}", "sentence_bad": "bad {i}"}}\n' for i in range(6)]
    file.write_bytes(lzma.compress("".join(lines).encode()))
    assert read_pairs(file, 3) == [(f"good {i}", f"bad {i}") for i in (0, 2, 4)]
    file.write_bytes(b"{}")
    with pytest.raises(WisparseError, match="sentence_good"):
        read_pairs(file)
    plain = tmp_path / "pairs.jsonl"
    plain.write_text('{"sentence_good": "good", "sentence_bad": 5}')
    with pytest.raises(WisparseError, match="expected sentences of text, found 5"):
        read_pairs(plain)


@pytest.mark.parametrize(
    ("options", "said"),
    [("--pairs 0", "pairs = 0: "), ("--pairs 1", "pairs = 1: "), ("--plan p --plan p/", "--plan p is given more than")],
)
def test_what_cannot_be_scored_is_a_line(monkeypatch, options, said):
    monkeypatch.setattr("sys.argv", ["x", "demo", "pairs.jsonl", *options.split()])
    with pytest.raises(SystemExit, match=f"^blimp_of_plans: {said}"):
        blimp_of_plans.main()


def test_saved_plans_are_scored_on_pairs(tmp_path, capsys, monkeypatch, tiny_model, tiny_tokens):
    """The share of pairs and the paired difference, beside the plan's method, target and folder."""
    plan = ws.calibrate(tiny_model, tiny_tokens, 0.7, "uniform", settings=SearchSettings(compare_teal=False))
    plan.save(tmp_path / "plan")
    rng = np.random.default_rng(0)
    texts = ["".join(chr(c) for c in rng.integers(2, 97, 6)) for _ in range(40)]
    lines = [json.dumps({"sentence_good": a, "sentence_bad": b}) for a, b in zip(texts[::2], texts[1::2], strict=True)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    tokenizer = types.SimpleNamespace(encode=lambda text: [ord(c) for c in text])
    monkeypatch.setattr(blimp_of_plans.ws, "load", lambda *_: tiny_model)
    monkeypatch.setattr(blimp_of_plans.ws, "load_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr("sys.argv", ["x", "tiny", f"{tmp_path}/pairs.jsonl", "--plan", f"{tmp_path}/plan"])
    blimp_of_plans.main()
    _, _, dense, sparse, _, end = capsys.readouterr().out.splitlines()
    found = log_likelihoods(tiny_model, [tokenizer.encode(t) for t in texts], {"p": ws.apply(tiny_model, plan)})
    one, other = ([good > bad for good, bad in v.reshape(-1, 2)] for v in (found["dense"], found["p"]))
    assert one != other and dense.startswith(f"| dense | {np.mean(one):.4f} ± ") and dense.endswith(" |  |")
    off = np.subtract(other, one, dtype=float)
    paired = f"{off.mean():+.4f} ± {off.std(ddof=1) / math.sqrt(20):.4f}"
    assert sparse.startswith(f"| uniform, 0.7, {tmp_path}/plan | {np.mean(other):.4f} ± ") and paired in sparse
    assert end.startswith("20 pairs, float32 on ")
