"""Plans and texts as rows, and what the comparison of methods adds: variants, parts of texts, going on, tables."""

import csv
import dataclasses
import math

import compare_methods
import numpy as np
import pytest
from compare_methods import ABLATIONS, part_of, variants_of
from plot_comparison import SPEEDS, curves, figures, gigabytes, sparsity_at, speeds, summary

import wisparse_jax as ws
from wisparse_jax.benchmark.cost import token_bytes
from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import read_config
from wisparse_jax.presets import shapes
from wisparse_jax.report.comparison import COLUMNS, append_rows, compare, read_rows
from wisparse_jax.search import SearchSettings
from wisparse_jax.search.pipeline import resolve
from wisparse_jax.search.stages import Basis, Budgets, Score, Training


@pytest.fixture
def tiny(monkeypatch, tiny_model, tiny_tokens):
    """Every model is the tiny one, and every text its tokens."""
    monkeypatch.setattr(compare_methods.ws, "load", lambda *_: tiny_model)
    monkeypatch.setattr(compare_methods.ws, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(compare_methods, "read_windows", lambda *_: np.asarray(tiny_tokens))


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
    assert [part_of(f"a={file}{part}") for part in ("", "@:2", "@2:", "@1:3")] == ["abcdef", "ab", "cdef", "bc"]
    with pytest.raises(WisparseError, match="expected name=FILE"):
        part_of("a.txt")


def test_every_ablation_is_a_method_that_the_search_takes():
    for variant in variants_of(("teal",), tuple(ABLATIONS), ("greedy", "paper"), "wisparse-plus"):
        method = resolve(variant.method, dataclasses.replace(SearchSettings(), **variant.switches))  # pyright: ignore[reportArgumentType]
        training = method.stage(Training)
        made_of = {
            "basis": method.stage(Basis).kind,
            "gains": method.stage(Score).gains,
            "allocator": method.stage(Budgets).allocator.name,
            "biases": "on" if training.biases else "off",
        }
        assert variant.switches.items() <= made_of.items()
        assert training.gains == (made_of["gains"] == "trained")
    assert all(len({name for name, *_ in rows}) == len(rows) for rows in ABLATIONS.values())
    with pytest.raises(WisparseError, match="methods: 'no'"):
        variants_of(("no",), (), (), "uniform")
    with pytest.raises(WisparseError, match="methods, ablations and allocators: expected one at least, found none"):
        variants_of((), (), (), "uniform")


def test_plans_are_scored_on_other_text_than_they_are_made_of(tmp_path, tiny, monkeypatch, tiny_tokens):
    """Sampled text of the calibration's seed would be the calibration text."""
    seeds = []
    monkeypatch.setattr(
        compare_methods, "read_windows", lambda *args: seeds.append(args[-1]) or np.asarray(tiny_tokens)
    )
    arguments = compare_methods.Arguments("tiny", tmp_path / "out", methods=("uniform",), seeds=(0, 1, 2))
    compare_methods.run(arguments)
    scored, *calibrated = seeds
    assert scored not in calibrated and calibrated == [0, 1, 2]
    with pytest.raises(WisparseError, match=f"seeds: {scored} is that of the texts"):
        compare_methods.run(dataclasses.replace(arguments, out=tmp_path / "other", seeds=(0, scored)))


def test_a_stopped_comparison_goes_on_to_the_same_rows(tmp_path, tiny, monkeypatch):
    """Stopped in its second seed: what is finished is not calibrated again, and another command is refused."""
    (tmp_path / "settings.yaml").write_text("tokens: 64\nstatistics_tokens: 64\n")
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
        compare_methods.run(stopped)
    with pytest.raises(WisparseError, match=f"{tmp_path}/stopped: holds another comparison"):
        compare_methods.run(dataclasses.replace(stopped, sparsities=(0.4,)))
    compare_methods.run(stopped)
    assert made == [("uniform", 0), ("wina", 0), ("uniform", 1), ("wina", 1), ("wina", 1)]
    compare_methods.run(dataclasses.replace(stopped, out=tmp_path / "whole"))
    found, expected = (read_rows([tmp_path / one], ["comparison.csv"]) for one in ("stopped", "whole"))
    kept = [[{k: v for k, v in row.items() if "seconds" not in k} for row in rows] for rows in (found, expected)]
    assert kept[0] == kept[1] and len(found) == 4
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
        compare_methods.run(compare_methods.Arguments("tiny", tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


def test_a_comparison_of_a_text_that_has_changed_is_another(tmp_path, tiny, monkeypatch):
    text, calibrated = tmp_path / "text.txt", []
    text.write_text("as it was")
    calibrate = compare_methods.ws.calibrate_targets
    monkeypatch.setattr(
        compare_methods.ws, "calibrate_targets", lambda *args: [calibrated.append(args[4]), calibrate(*args)][1]
    )
    # A name that reads as a number is a name all the same.
    arguments = compare_methods.Arguments("tiny", tmp_path / "out", (f"007={text}",), methods=("uniform",))
    compare_methods.run(arguments)
    compare_methods.run(arguments)
    assert calibrated == [0]
    text.write_text("as it is")
    with pytest.raises(WisparseError, match=f"{tmp_path}/out: holds another comparison: other arguments, texts"):
        compare_methods.run(arguments)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(WisparseError, match=f"{tmp_path}/other: exists already, and holds no comparison"):
        compare_methods.run(dataclasses.replace(arguments, out=tmp_path / "other"))


@pytest.fixture(scope="module")
def rows(tiny_model, tiny_tokens):
    """Of two kinds of weights, by a plan in the model's own basis and one in another."""
    settings = ws.SearchSettings(compare_teal=False, basis="eigen")
    plans = {
        ("teal", 0.5): ws.calibrate(
            tiny_model, tiny_tokens, 0.5, "uniform", settings=ws.SearchSettings(compare_teal=False)
        )
    }
    plans["turned", 0.5] = ws.calibrate(tiny_model, tiny_tokens, 0.5, "uniform", settings=settings)
    texts = {"one": np.asarray(tiny_tokens), "other": np.asarray(tiny_tokens)[:1]}
    common = {"model": "tiny", "group": "weights", "calibration": "one", "seed": 0, "calibration_tokens": 1}
    kinds = ("stored", "int4", "int4, compensated")
    found = compare(tiny_model, plans, texts, kinds, rounded_by=texts["one"])
    return plans, texts, [common | row for row in found]


def test_every_kind_of_weights_is_measured_dense_and_by_every_plan(rows, tiny_model):
    plans, texts, found = rows
    in_order = [(row["weights"], row["evaluation"], row["variant"], row["basis"]) for row in found]
    assert in_order == [
        (kind, text, *one)
        for kind in ("stored", "int4", "int4, compensated")
        for text in texts
        for one in (("dense", "model"), ("teal", "model"), ("dense", "plan"), ("turned", "plan"))
    ]
    kl = {(row["weights"], row["variant"], row["basis"]): row["kl"] for row in found if row["evaluation"] == "one"}
    assert abs(kl["stored", "dense", "model"]) < 1e-6 and kl["int4", "dense", "model"] > 1e-6
    assert kl["int4, compensated", "dense", "model"] < kl["int4", "dense", "model"]
    for row in found:
        assert (row["sparsity"], row["realised"]) == (0, 0) or abs(row["realised"] - row["sparsity"]) < 0.1
        weights = None if row["weights"] == "stored" else "int4"
        assert row["megabytes"] == token_bytes(tiny_model.config, weights, None, row["realised"]) / 1e6
        assert set(row) <= set(COLUMNS)
        if row["variant"] != "dense":
            sparse = ws.apply(tiny_model, plans[row["variant"], 0.5], weights)
            score = ws.evaluate(tiny_model, texts[row["evaluation"]], {"plan": sparse}).sparse["plan"]
            assert row["weights"].endswith("compensated") or row["kl"] == pytest.approx(score.kl.mean, rel=1e-4)
            assert row["minus_teal"] == 0 or row["variant"] == "turned"


def test_as_they_are_stored_only_plans_have_rows(rows, tiny_model):
    plans, texts, found = rows
    stored = compare(tiny_model, plans, texts)
    assert [(row["evaluation"], row["variant"]) for row in stored] == [
        (t, v) for t in texts for v in ("teal", "turned")
    ]
    same = [row for row in found if row["weights"] == "stored" and row["variant"] != "dense"]
    assert [row["kl"] for row in stored] == [row["kl"] for row in same]


def test_rows_of_weights_are_drawn_and_tabulated(rows, tmp_path):
    append_rows(tmp_path / "comparison.csv", COLUMNS, rows[-1])
    found = read_rows([tmp_path], ["comparison.csv"])
    assert [name for name, _ in figures(found)] == ["tiny one one weights", "tiny one other weights"]
    assert summary(found).count("\n| int4, compensated | model's |") == 4
    assert all([row["sparsity"] for row in line] == [0.5, 0] for line in curves(found).values())


def test_bytes_and_speeds_are_those_of_the_benchmark(repository):
    """The committed speeds' own column of bytes, which was printed by the benchmark, from shapes alone."""
    large = read_config(shapes()["llama-3.1-8b"])
    with SPEEDS.open(newline="") as lines:
        for row in csv.DictReader(lines):
            weights, head = (None if row[name] == "bfloat16" else row[name] for name in ("weights", "head"))
            assert token_bytes(large, weights, head, float(row["sparsity"])) / 1e9 == pytest.approx(
                float(row["gigabytes"]), abs=0.03
            )
    found = speeds()
    assert found["int4", "int8", 0.5] == 602.5 and found[None, None, 0.0] == 184.5
    page = (repository / "docs" / "benchmarks" / "h100.md").read_text()
    assert all(f"{speed:.1f}" in page for speed in found.values())


def test_the_committed_rows_of_weights_are_those_of_the_page(repository, tmp_path):
    """Converted to the columns of a comparison, they give the page's table; dense rows and realised sparsities, too."""
    committed = repository / "docs" / "benchmarks"
    (tmp_path / "comparison.csv").write_bytes((committed / "formats-smollm2.csv").read_bytes())
    text = summary(read_rows([tmp_path], ["comparison.csv"])).replace("| stored |", "| bfloat16 |")
    lines = [line for line in text.splitlines() if line.startswith(("| bfloat16", "| int"))]
    page = (committed / "formats.md").read_text().splitlines()
    assert len(lines) == 24 and [line for line in lines if line not in page] == []


def test_the_better_of_two_rows_is_drawn():
    made = [
        {"weights": "int8", "basis": basis, "sparsity": target, "kl": kl}
        for basis, target, kl in (("model", 0.0, 3.0), ("plan", 0.0, 2.0), ("plan", 0.5, 4.0))
    ]
    assert [(row["sparsity"], row["kl"]) for row in curves(made)["int8"]] == [(0.5, 4.0), (0.0, 2.0)]
    row = {"weights": "int4, compensated", "head": None, "realised": 0.0}
    assert gigabytes(row) == pytest.approx(4.72, abs=0.005)
