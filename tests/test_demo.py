"""`wisparse demo` on a tiny model: what it compares, what it writes, and that an interruption leaves nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wisparse_jax.errors import WisparseError
from wisparse_jax.models import hub
from wisparse_jax.report import demo
from wisparse_jax.search import SearchSettings
from wisparse_jax.sparsity import SparsityPlan
from wisparse_jax.testing import write_tiny_folder

SETTINGS = SearchSettings(window=32, tokens=128, statistics_tokens=64, gradient_tokens=64, compare_teal=False)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The demo of a tiny model, searches replaced by uniform's and grinqh's; what the searches and scores were of."""
    write_tiny_folder(tmp_path / "model")
    seen: dict[str, Any] = {"methods": []}
    search, score = demo.calibrate, demo.evaluate

    def calibrate(
        model: Any, tokens: Any, sparsity: float, method: str, *args: Any, bits: float | None, **how: Any
    ) -> SparsityPlan:
        seen["calibration"] = tokens
        seen["methods"].append((method, bits or sparsity))
        quick = "grinqh" if bits else "uniform"
        return dataclasses.replace(search(model, tokens, sparsity, quick, *args, bits=bits, **how), method=method)

    def evaluate(model: Any, text: Any, *args: Any, **how: Any) -> Any:
        seen["evaluation"] = text
        return score(model, text, *args, **how)

    monkeypatch.setattr(hub, "resolve", lambda *_: tmp_path / "model")
    monkeypatch.setattr(demo, "SETTINGS", SETTINGS)
    monkeypatch.setattr(demo, "EVALUATION_WINDOWS", 3)
    monkeypatch.setattr(demo, "forecast", lambda *given: seen.update(forecast=given[1:]) or "about a year")
    monkeypatch.setattr(demo, "calibrate", calibrate)
    monkeypatch.setattr(demo, "evaluate", evaluate)
    return seen


def test_the_demo_scores_on_other_text_than_it_calibrates_on(
    run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = demo.run_demo(tmp_path / "out")
    assert run["methods"] == [(name, 3.0 if name == "planes" else 0.5) for name in demo.SHOWN]
    one, other = run["calibration"], run["evaluation"]
    assert one.shape == (4, 32) and other.shape == (3, 32) and not (one[:3] == other).all(axis=1).any()
    assert demo.CALIBRATION_SEED != demo.EVALUATION_SEED
    assert sorted(path.name for path in out.iterdir()) == sorted([*demo.SHOWN, "evaluation.json"])
    figures = json.loads((out / "evaluation.json").read_text())
    assert set(figures) == set(demo.SHOWN) and all(row["kl"] > 0 for row in figures.values())
    for name in demo.SHOWN:
        plan = SparsityPlan.load(out / name)
        assert plan.method == name and plan.calibration["text"] == "self"
        np.testing.assert_allclose(plan.mean_sparsity, 1 - 3 / 8.125 if name == "planes" else 0.5, rtol=1e-6)
    captured = capsys.readouterr()
    assert "planes reads 3." in captured.out or "planes reads 2." in captured.out
    assert str(out / "evaluation.json") in "".join(captured.out.split())
    assert captured.err.startswith("about a year\n")
    methods, *rest = run["forecast"]
    assert [method.name for method in methods] == list(demo.SHOWN)
    assert rest == [SETTINGS, 1, 128 + 3 * 32, 3 * 32 * (1 + len(demo.SHOWN))]


@pytest.mark.parametrize("stage", ["calibrate", "evaluate", "generate"])
def test_an_interrupted_demo_leaves_nothing_and_can_be_run_again(
    run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, stage, interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_place_that_cannot_be_written_is_refused_at_once(
    run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "load", lambda *_: pytest.fail("loaded the model"))
    (tmp_path / "file").write_text("")
    for place, message in ((tmp_path / "model", "exists already"), (tmp_path / "file" / "out", "is a file")):
        with pytest.raises(WisparseError, match=message):
            demo.run_demo(place)
