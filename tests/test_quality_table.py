"""The table of quality by kind of weights and sparsity: which rows there are, what they hold, and which are drawn."""

import csv

import pytest
from plot_quality import curves
from quality_table import COLUMNS, Arguments, bytes_of, measured, read_speeds, table

import wisparse_jax as ws
from wisparse_jax.models.config import read_config
from wisparse_jax.presets import shapes
from wisparse_jax.testing import tiny_config


@pytest.fixture(scope="module")
def rows(tiny_model, tiny_tokens, tmp_path_factory):
    args = Arguments("tiny", tmp_path_factory.mktemp("table"), kinds=("bfloat16", "int4"), context=8)
    plan = ws.calibrate(tiny_model, tiny_tokens, 0.5, "uniform", settings=ws.SearchSettings(compare_teal=False))
    return list(measured(args, tiny_model, tiny_tokens, tiny_tokens, [plan]))


def test_every_kind_is_measured_dense_and_by_every_plan(rows):
    assert [(row["weights"], row["target"]) for row in rows] == [
        ("bfloat16", 0.0), ("bfloat16", 0.5), ("int4", 0.0), ("int4", 0.5),
    ]  # fmt: skip
    kl = [row["kl"] for row in rows]
    assert abs(kl[0]) < 1e-6 < kl[1] and kl[2] > 1e-3
    assert rows[0]["sparsity"] == 0 and all(abs(row["sparsity"] - 0.5) < 0.1 for row in rows[1::2])
    for row in rows:
        weights = None if row["weights"] == "bfloat16" else "int4"
        assert row["megabytes"] == bytes_of(tiny_config(), weights, None, row["sparsity"], 8) / 1e6
    assert set(rows[0]) | {"tokens_per_second_8b"} == set(COLUMNS)
    speed = {"tokens_per_second_8b": None}
    assert table("title", [row | speed for row in rows]).count("\n| ") == len(rows) + 1


def test_bytes_and_speeds_are_those_of_the_benchmark(repository):
    """The committed speeds' own column of bytes, which was printed by the benchmark, from shapes alone."""
    file = repository / "docs" / "benchmarks" / "decode-h100.csv"
    large = read_config(shapes()["llama-3.1-8b"])
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            weights, head = (None if row[name] == "bfloat16" else row[name] for name in ("weights", "head"))
            found = bytes_of(large, weights, head, float(row["sparsity"]), 512) / 1e9
            assert found == pytest.approx(float(row["gigabytes"]), abs=0.03)
    speeds = read_speeds(file)
    assert speeds["int4", "int8", 0.5] == 602.5 and speeds["bfloat16", None, 0.0] == 184.5
    page = (repository / "docs" / "benchmarks" / "h100.md").read_text()
    assert all(f"{speed:.1f}" in page for speed in speeds.values())


def test_the_better_of_two_rows_is_drawn():
    made = [
        dict.fromkeys(COLUMNS, "1") | {"weights": "int8", "basis": basis, "target": target, "kl": kl}
        for basis, target, kl in (("model", "0.0", "3"), ("plan", "0.0", "2"), ("plan", "0.5", "4"))
    ]
    assert [(row["target"], row["kl"]) for row in curves(made)["int8"]] == [(0.5, 4.0), (0.0, 2.0)]
