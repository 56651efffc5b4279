"""Reports of plans: what the page holds, that it needs nothing else, and that nothing from a plan is markup."""

import base64
import io
import re

import numpy as np
import pytest

from wisparse_jax.cli import main
from wisparse_jax.errors import WisparseError
from wisparse_jax.report.figures import drawable
from wisparse_jax.report.page import write_report
from wisparse_jax.sparsity import SparsityPlan

DRAWN = ("budgets", "exponents", "held_out_kl", "predicted", "convergence", "stages")
PNG = b"\x89PNG\r\n\x1a\n"


def a_plan(seed=0, blocks=4, **changes):
    rng = np.random.default_rng(seed)
    weights = (4, 2, 2, 4, 11, 11, 11)
    sparsities = rng.uniform(0.3, 0.7, (blocks, 7))
    sparsities += 0.5 - (sparsities @ np.array(weights)).mean() / sum(weights)
    held_out = {
        "windows": 4,
        "dense_perplexity": 12.25,
        "plan": {"kl": 0.1234, "perplexity": 13.5, "sparsity": 0.5012},
        "uniform": {"kl": 0.2345, "perplexity": 15.5, "sparsity": 0.5001},
    }
    fields = {
        "method": "wisparse",
        "target": 0.5,
        "exponents": rng.uniform(0, 1.5, (blocks, 7)),
        "sparsities": sparsities,
        "thresholds": np.ones((blocks, 7)),
        "realised": sparsities,
        "layer_weights": weights,
        "fingerprint": "0123456789abcdef" * 4,
        "seed": 0,
        "held_out": held_out,
        "timings": {"statistics": 1.5, "budgets": 20.0},
        "history": {
            "budgets 0.5": {"best": [0.3, 0.2, 0.15, 0.14], "predicted": 0.11},
            "notes": ["a search on 7 positions"],
        },
        "calibration": {"text": "self"},
    }
    return SparsityPlan(**fields | changes)


def test_the_page_needs_nothing_beside_it(tmp_path):
    page = write_report({"first": a_plan(), "second": a_plan(1)}, tmp_path / "report", "Two plans")
    text = page.read_text()
    assert page == tmp_path / "report" / "index.html" and "<h1>Two plans</h1>" in text
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', text)
    assert len(sources) == 2 * 6 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r'"data:[^"]*"', "", text) and "<script" not in text
    names = {file.name for file in page.parent.iterdir()} - {"index.html"}
    assert names == {f"{n}.png" for n in DRAWN}
    embedded = {base64.b64decode(source.partition(",")[2]) for source in sources}
    assert {(page.parent / name).read_bytes() for name in names} < embedded and all(e.startswith(PNG) for e in embedded)
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text


def test_the_numbers_are_the_plans(tmp_path):
    plan = a_plan()
    text = write_report({"first": plan}, tmp_path / "report").read_text()
    flat = re.sub(r"\s+", " ", text)
    assert "<td>the plan</td><td>0.1234</td><td>13.50</td><td>0.5012</td>" in flat
    assert "<td>dense</td><td>0</td><td>12.25</td><td>0</td>" in flat
    assert "<td>uniform</td><td>0.2345</td><td>15.50</td><td>0.5001</td>" in flat
    blocks = plan.sparsities @ np.array(plan.layer_weights) / sum(plan.layer_weights)
    assert f"<td>{blocks.argmin()} ({blocks.min():.3f})</td><td>{blocks.argmax()} ({blocks.max():.3f})</td>" in flat
    assert "".join(f"<td>{value:.3f}</td>" for value in plan.sparsities.mean(axis=0)) in flat
    assert "<li>first: a search on 7 positions</li>" in flat


def test_light_and_dark_figures_differ_in_their_page(tmp_path):
    import matplotlib.image

    text = write_report({"first": a_plan()}, tmp_path / "report").read_text()
    corners = []
    for kind in ("src", "srcset"):
        first = re.findall(rf'{kind}="data:image/png;base64,([^"]*)"', text)[0]
        corners.append(np.asarray(matplotlib.image.imread(io.BytesIO(base64.b64decode(first))))[0, 0, :3])
    assert corners[0].mean() > 0.9 and corners[1].mean() < 0.2


def test_every_stage_is_in_the_legend_and_in_the_picture():
    from matplotlib.figure import Figure

    from wisparse_jax.report.figures import stages

    names = [f"stage {i}" for i in range(10)]
    for count in (1, 4):
        canvas = Figure(layout="constrained")
        stages({f"plan {i}": a_plan(timings=dict.fromkeys(names, 5.0)) for i in range(count)}, canvas)
        canvas.draw_without_rendering()
        [legend] = canvas.legends
        assert [text.get_text() for text in legend.get_texts()] == names
        box, page = legend.get_window_extent(), canvas.bbox
        assert box.y0 >= 0 and box.x0 >= 0 and box.x1 <= page.x1 and box.y1 < page.y1 / 2


def test_text_of_a_plan_is_no_markup(tmp_path):
    evil = "<script>alert(1)</script>"
    plan = a_plan(method=evil, calibration={"text": evil}, history={"notes": [evil]})
    text = write_report({f"{evil} $x$": plan}, tmp_path / "report", evil).read_text()
    assert "<script" not in text and text.count("&lt;script&gt;") >= 6


def test_only_what_there_is_is_drawn():
    bare = a_plan(held_out={"forward_tokens": 12}, timings={}, history={}, exponents=np.ones((4, 7)))
    assert set(drawable({"bare": bare})) == {"budgets"}


def test_the_command_draws_plans_of_any_format(repository, tmp_path, capsys):
    old = repository / "tests" / "fixtures" / "format-1" / "plan"
    a_plan(calibration={}).save(tmp_path / "new")
    main(["report", str(old), str(tmp_path / "new"), "--out", str(tmp_path / "report")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report" / "index.html")
    text = (tmp_path / "report" / "index.html").read_text()
    assert "<td>plan</td>" in text and "<td>new</td>" in text
    with pytest.raises(SystemExit):
        main(["report", str(old), "--out", str(tmp_path / "report")])
    assert "exists already" in capsys.readouterr().err


def test_no_plans_are_refused(tmp_path):
    with pytest.raises(WisparseError, match="expected at least one plan"):
        write_report({}, tmp_path / "report")


def test_a_plan_is_shown_on_one_screen(repository, tmp_path, capsys):
    plan = a_plan(blocks=12, calibration={"text": "self", "tokens": 8192, "window": 512})
    plan.save(tmp_path / "new")
    main(["show", str(tmp_path / "new")])
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 40 and max(map(len, out.splitlines())) <= 120
    order, blocks = plan.block_sparsities.argsort(), plan.block_sparsities
    assert f"least sparse blocks: {order[0]} ({blocks[order[0]]:.3f}), {order[1]} (" in out
    assert f"most sparse blocks: {order[-1]} ({blocks[order[-1]]:.3f}), {order[-2]} (" in out
    words = re.sub(r"[^\w.,]+", " ", out)
    assert "wisparse plan target 0.5000, realised 0.5000" in words and "self 8,192 tokens in windows of 512" in words
    assert " ".join(f"{value:.3f}" for value in plan.sparsities.mean(axis=0)) + " 0.5000" in words
    assert "uniform 15.50 0.2345 0.5001" in words and "this plan 13.50 0.1234 0.5012" in words
    assert "time 22 s statistics 1.5, budgets 20.0" in words and "note a search on 7 positions" in words
    main(["show", str(repository / "tests" / "fixtures" / "format-1" / "plan")])
    out = capsys.readouterr().out
    assert "wisparse plan: target 0.5000" in out and "realised" not in out.split("by layer")[1]
    even = a_plan(sparsities=np.full((4, 7), 0.5), realised=np.full((4, 7), 0.5))
    even.save(tmp_path / "even")
    main(["show", str(tmp_path / "even")])
    assert "all blocks equally sparse" in capsys.readouterr().out


def test_names_are_no_mathematics_and_all_stand_in_the_legend(tmp_path, monkeypatch):
    from matplotlib.legend import Legend

    legends, make = [], Legend.__init__
    monkeypatch.setattr(Legend, "__init__", lambda self, *a, **k: (make(self, *a, **k), legends.append(self))[0])
    names = ["x$1_$2", "_hidden", "[/raw]", r"\frac{"]
    write_report({name: a_plan(timings={"x$_$": 1.0}) for name in names}, tmp_path / "report")
    found = {text.get_text().strip() for legend in legends for text in legend.get_texts()}
    assert {*names, "x$_$"} <= found


@pytest.mark.parametrize(
    ("variable", "value"),
    [("MPLBACKEND", "a backend that there is not"), ("MPLBACKEND", "module://not.installed"), ("MATPLOTLIBRC", "rc")],
)
def test_figures_need_no_backend_and_none_of_the_users_settings(tmp_path, run_python, monkeypatch, variable, value):
    (tmp_path / "rc").write_bytes(b"text.usetex: True\n\xff")  # no LaTeX, and no UTF-8
    code = (
        "import io, os, sys\nfrom wisparse_jax.report.canvas import drawn\nbefore = dict(os.environ)\n"
        "print(drawn(lambda canvas: canvas.suptitle('a'), {})[:4] == b'\\x89PNG' and before == os.environ)"
    )
    monkeypatch.setenv(variable, str(tmp_path / value) if value == "rc" else value)
    assert run_python(code).stdout == "True\n"


def test_a_figure_is_the_same_whatever_a_user_has_set():
    import matplotlib

    from wisparse_jax.report.canvas import drawn

    def draw(canvas):
        canvas.subplots().plot([1, 2])

    with matplotlib.rc_context({"text.usetex": True, "lines.linewidth": 9, "figure.facecolor": "red"}):
        found = drawn(draw, {})
    assert found == drawn(draw, {})
