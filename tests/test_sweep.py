"""A sweep's table is what its plans give; one calibration a method; its picture is what the scripts draw too."""

import csv
import io
import json
import sys
from unittest.mock import Mock

import matplotlib.image
import numpy as np
import plot_comparison
import pytest

import wisparse_jax as ws
from wisparse_jax.cli import main
from wisparse_jax.evaluation import text_windows
from wisparse_jax.report.comparison import read_rows
from wisparse_jax.search.pipeline import calibrate_targets
from wisparse_jax.testing import PROSE, write_tiny_folder

SETTINGS = "window: 32\ntokens: 128\nstatistics_tokens: 64\ncompare_teal: false\n"
METHODS, TARGETS = ("uniform", "wina"), (0.3, 0.6)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A folder with the model and the texts, the sweep in it, and how often something was calibrated."""
    folder = tmp_path_factory.mktemp("sweep")
    write_tiny_folder(folder / "model")
    (folder / "settings.yaml").write_text(SETTINGS)
    (folder / "first.txt").write_text(PROSE * 3)
    (folder / "second.txt").write_text(PROSE[40:] * 3)
    calls = []
    patch = pytest.MonkeyPatch()
    patch.setattr(
        "wisparse_jax.search.calibrate_targets",
        lambda *given, **how: calls.append(given[3]) or calibrate_targets(*given, **how),
    )
    texts = ["--text", str(folder / "first.txt"), "--evaluate", str(folder / "second.txt")]
    how = ["--config", str(folder / "settings.yaml"), "--evaluation-tokens", "96"]
    which = ["--methods", *METHODS, "--sparsity", *map(str, TARGETS)]
    forecast = Mock(return_value=None)
    patch.setattr("wisparse_jax.search.cost.forecast", forecast)
    main(["sweep", str(folder / "model"), "--out", str(folder / "out"), *which, *texts, *how])
    patch.undo()
    return folder, calls, forecast.call_args.args


def test_there_is_one_calibration_a_method(swept):
    assert swept[1] == list(METHODS)


def test_its_time_is_that_of_all_methods_and_of_measuring_every_plan(swept):
    _, methods, settings, targets, sampled, read = swept[2]
    assert [method.name for method in methods] == list(METHODS) and targets == len(TARGETS)
    assert (settings.tokens, sampled, read) == (128, 0, 96 * (1 + len(METHODS) * len(TARGETS)))


def test_the_table_holds_what_the_plans_give(swept):
    folder, *_ = swept
    with (folder / "out" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], float(row["sparsity"])) for row in rows] == [(m, t) for m in METHODS for t in TARGETS]
    model = ws.load(folder / "model")
    windows = text_windows(ws.load_tokenizer(folder / "model"), folder / "second.txt", 32, 96)
    for row in rows:
        plan = ws.SparsityPlan.load(folder / "out" / "plans" / f"{row['method']}-{row['sparsity']}")
        score = ws.evaluate(model, windows, {"plan": ws.apply(model, plan)}).sparse["plan"]
        assert float(row["kl"]) == pytest.approx(score.kl.mean, rel=1e-4)
        assert float(row["perplexity"]) == pytest.approx(score.perplexity.mean, rel=1e-4)
        assert float(row["realised"]) == pytest.approx(score.sparsity.mean, rel=1e-4)
        assert row["calibration"] == "first.txt" and row["evaluation"] == "second.txt" and row["model"] == "model"
    assert all(float(one["kl"]) < float(other["kl"]) for one, other in (rows[:2], rows[2:]))


def test_the_folder_holds_picture_plans_and_conditions(swept):
    out = swept[0] / "out"
    plans = {f"{method}-{target}" for method in METHODS for target in TARGETS}
    assert {path.name for path in out.iterdir()} == {"sweep.csv", "sweep.json", "sweep.png", "sweep-dark.png", "plans"}
    assert {path.name for path in (out / "plans").iterdir()} == plans
    stated = json.loads((out / "sweep.json").read_text())
    assert stated["settings"]["tokens"] == 128 and stated["versions"]["wisparse_jax"] == ws.__version__
    assert str(swept[0]) not in (out / "sweep.json").read_text() + (out / "sweep.csv").read_text()
    assert not list(swept[0].glob(".out*"))


def test_the_script_draws_the_same_picture(swept):
    rows = read_rows([swept[0] / "out"], ["comparison.csv", "sweep.csv"])
    found = dict(plot_comparison.pictures(rows))
    assert list(found) == ["model-first.txt-second.txt-picture.png", "model-first.txt-second.txt-picture-dark.png"]
    for picture, name in zip(found.values(), ("sweep.png", "sweep-dark.png"), strict=True):
        one, other = (matplotlib.image.imread(io.BytesIO(p)) for p in (picture, (swept[0] / "out" / name).read_bytes()))
        assert one.shape[:2] == (510, 1350) and np.abs(one - other).mean() < 0.01
    dark = found["model-first.txt-second.txt-picture-dark.png"]
    assert matplotlib.image.imread(io.BytesIO(dark))[0, 0, :3].mean() < 0.2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"model,sparsity\nx,\xff\n", "in UTF-8"),
        (b"model,kl\nx,1\n", "line 1: expected names"),
        (b"model,sparsity,kl,kl\nx,1,2,3\n", "line 1: expected names, none twice"),
        (b"model,sparsity,kl\nx,0.5,much\n", "row 1: kl: expected a number, found 'much'"),
        (b"model,sparsity,group\nx,0.5,\n", "row 1: group: expected text"),
        (b"model,sparsity\nx,1\ny\n", "row 2: expected a cell"),
        (b"model,sparsity\nx,1,2\n", "row 1: expected a cell"),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path, monkeypatch, content, said):
    (tmp_path / "comparison.csv").write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["plot_comparison.py", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=f"plot_comparison: {tmp_path}/comparison.csv: .*{said}"):
        plot_comparison.main()
    assert not (tmp_path / "out").exists()


def test_a_line_goes_on_over_what_was_not_measured():
    from matplotlib.figure import Figure

    from wisparse_jax.report.curves import draw_against_sparsity

    pairs = {"teal": [0.7, None, 0.6], "wina": [None, None, None]}
    rows = [
        {"variant": name, "sparsity": p, "realised": p, "perplexity": value, "dense_perplexity": 0.75}
        for name, values in pairs.items()
        for p, value in zip((0.3, 0.5, 0.7), values, strict=True)
    ]
    axes = Figure().add_subplot()
    draw_against_sparsity(axes, rows, "perplexity", "perplexity")
    assert [np.asarray(line.get_xydata()).tolist() for line in axes.lines] == [
        [[30, 0.7], [70, 0.6]],
        [[0, 0.75], [1, 0.75]],  # the dense model's, from edge to edge
    ]
