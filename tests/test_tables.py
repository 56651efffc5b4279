"""Tables for a terminal of 80 columns: names and figures are whole."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from rich.console import Console, RenderableType

from wisparse_jax.cli import main
from wisparse_jax.evaluation import Evaluation, Figure, Score, SparseScore
from wisparse_jax.report import tables
from wisparse_jax.report.demo import SHOWN
from wisparse_jax.search import METHODS

WIDTH = 80


def shown(table: RenderableType) -> str:
    """What such a terminal shows; no line is longer, and nothing is cut off."""
    console = Console(width=WIDTH)
    with console.capture() as captured:
        console.print(table)
    text = captured.get()
    assert "…" not in text and max(map(len, text.splitlines())) <= WIDTH
    return text


def scores(*names: str) -> Evaluation:
    """Figures as wide as they usually are: a perplexity of 20.09 ± 1.16, and a KL of as many digits."""
    two = np.array([-1.0, 1.0])
    nll, kl = 3 + 0.0577 * two, 0.3 + 0.0123 * two
    tokens = 0.5 + np.array([[-0.3, 0.299], [-0.299, 0.3]])
    sparse = SparseScore(nll, kl, tokens, np.full((1, 7), 0.5))
    return Evaluation(Score(nll), dict.fromkeys(names, sparse), scored_positions=256, window=512, sparse_prefill=0.5)


def test_a_row_of_figures_is_a_line() -> None:
    text = shown(tables.quality_table(scores(*METHODS), "figures"))
    for name in METHODS:
        (line,) = [line for line in text.splitlines() if line.startswith(f"│ {name} ")]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells == [name, "20.09 ± 1.16", "0.3000 ± 0.0123", "0.5000 ± 0.0005", "0.2995"]


def test_shares_beside_those_of_the_rival() -> None:
    """A line a plan within the width, with the longest names that methods have."""
    found = scores("teal", "wisparse-plus", "wisparse-paper")
    half = dataclasses.replace(found.sparse["teal"], window_kl=found.sparse["teal"].window_kl / 2)
    rivals = {"wisparse-plus": "teal", "wisparse-paper": "teal"}
    text = shown(tables.share_table(dataclasses.replace(found, rivals=rivals, matched=dict.fromkeys(rivals, half))))
    (line,) = [line for line in text.splitlines() if line.startswith("│ wisparse-plus ")]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells == ["wisparse-plus", "teal", "0.3000 ± 0.0123", "0.1500 ± 0.0061", "0.5000", "0.500"]
    assert not any(line.startswith("│ teal ") for line in text.splitlines())


def test_a_long_name_goes_on_below() -> None:
    name = "plan-of-the-first-of-several-experiments"
    text = shown(tables.quality_table(scores(name), "figures"))
    assert "".join(line.strip("│").split("│")[0].strip() for line in text.splitlines() if "│ " in line).endswith(name)


def test_every_stage_has_a_row_and_every_method_a_column() -> None:
    timings = {name: {stage: 184.4 for stage in tables.ROWS} for name in SHOWN}
    del timings["teal"]["basis"]
    rows = {
        cells[0]: cells[1:]
        for line in shown(tables.timing_table(timings)).splitlines()
        if len(cells := [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]) > 1
    }
    assert rows[""] == list(SHOWN) and set(rows) == {"", *tables.ROWS, "in all"}
    assert rows["basis"] == ["184.4", "-", "184.4", "184.4", "184.4"]
    assert rows["in all"][:2] == [f"{184.4 * len(tables.ROWS):.1f}", f"{184.4 * (len(tables.ROWS) - 1):.1f}"]


def test_the_list_of_methods_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tables, "console", lambda: Console(width=WIDTH))
    main(["methods"])
    lines = capsys.readouterr().out.splitlines()
    assert "…" not in "".join(lines) and max(map(len, lines)) <= WIDTH
    for name, method in METHODS.items():
        assert sum(line.startswith(f"│ {name} ") for line in lines) == 1
        assert sum(line.startswith(f"{name}: {method.summary[:20]}") for line in lines) == 1


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither markup nor the name of a picture: two plans do not become one."""
    names = ["run[a]", "run[b]", "[/raw]", ":smile:"]
    tables.console().print(tables.quality_table(scores(*names), "tokens of d[/raw].txt"))
    out = capsys.readouterr().out
    assert all(f"│ {name} " in out for name in names) and "tokens of d[/raw].txt" in out


def test_zero_has_no_sign() -> None:
    figure = Figure(-1e-9, 0.00123)
    assert f"{figure:.4f}" == "0.0000 ± 0.0012" and f"{figure:+.4f}" == "+0.0000 ± 0.0012"
    assert f"{Figure(-0.01, 0.002):+.3f}" == "-0.010 ± 0.002" and str(Figure(-0.0, 1.0)) == "0 ± 1"


def test_an_error_that_one_window_leaves_unknown_is_left_out() -> None:
    figure = Figure.over(np.array([0.25]))
    assert (str(figure), f"{figure:.4f}", f"{figure:+.2f}") == ("0.25", "0.2500", "+0.25")
