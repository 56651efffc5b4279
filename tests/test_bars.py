"""Bars where nothing redraws a line: a file, a log, the output of a job."""

import time

import pytest

from wisparse_jax import bars


@pytest.fixture(autouse=True)
def log(monkeypatch):
    monkeypatch.setattr(bars, "redraws", lambda: False)


def test_a_line_comes_every_so_often_and_says_what_is_done(capsys, monkeypatch):
    monkeypatch.setattr(bars, "EVERY", 0.2)
    shown = bars.bar(total=10, desc="search: basis", smoothing=0)
    for _ in range(10):
        time.sleep(0.05)
        shown.update(1)
    shown.close()
    err = capsys.readouterr().err
    lines = err.splitlines()
    assert 1 <= len(lines) <= 3 and "\r" not in err and err.endswith("\n")
    for line in lines:
        assert line.startswith("search: basis: ") and " %, 00:00 gone, about 00:00 left" in line
    assert [int(line.split()[2]) for line in lines] == sorted({int(line.split()[2]) for line in lines})


def test_what_is_short_or_not_wanted_says_nothing(capsys):
    assert list(bars.bar(range(3), desc="quick", leave=False)) == [0, 1, 2]
    with bars.bar(total=4, desc="silent", disable=True) as shown:
        shown.update(4)
    assert capsys.readouterr().err == ""
