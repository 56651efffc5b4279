"""Calibration on several texts."""

import numpy as np
import pytest

import wisparse_jax as ws
from wisparse_jax.commands import texts as module
from wisparse_jax.commands.texts import Texts
from wisparse_jax.errors import WisparseError
from wisparse_jax.search.judge import held_out_windows

PROSE = "The harbour was quiet when the boats came home, and a boy sat on the wall and counted them all. "
LISTS = "Bread, butter, cheese, two pounds of apples, a dozen eggs, salt; then the post office and the bank. "


@pytest.fixture
def files(tmp_path):
    (tmp_path / "prose.txt").write_text(PROSE * 60)
    (tmp_path / "lists.txt").write_text(LISTS * 60)
    (tmp_path / "short.txt").write_text(LISTS * 6)
    return tmp_path


def kinds(windows, files, names):
    """Of which text each window is; -1 is none of them."""
    tokenizer = ws.load_tokenizer("demo")
    whole = [tokenizer.decode(tokenizer.encode((files / name).read_text())) for name in names]
    found = []
    for window in windows:
        text = tokenizer.decode(window[2:-2].tolist()).strip()
        found.append(next((k for k, own in enumerate(whole) if text in own), -1))
    return found


def test_every_text_has_its_share_in_any_stretch(files, monkeypatch):
    sampled = np.full((100, 32), 7, np.int32)
    monkeypatch.setattr(
        module,
        "sampled_windows",
        lambda model, name, window, tokens, seed: (sampled[: tokens // window], "self (x)", ("chat", "list")),
    )
    names = [str(files / "prose.txt"), "self", str(files / "lists.txt")]
    texts = Texts("demo", names, 32, 32 * 25)
    assert (texts.count, texts.sampled_tokens, texts.record) == (25, 8 * 32, "prose.txt + self + lists.txt")
    windows = texts.windows(None, 0)  # type: ignore[arg-type]
    assert windows.shape == (25, 32) and texts.record == "prose.txt + self (x) + lists.txt"
    found = kinds(windows, files, ["prose.txt", "lists.txt"])
    assert [found.count(k) for k in (0, -1, 1)] == [9, 8, 8]
    named = {0: {"prose.txt"}, 1: {"lists.txt"}, -1: {"self, chat", "self, list"}}
    assert all(kind in named[own] for kind, own in zip(texts.kinds, found, strict=True))
    assert texts.kinds.count("self, chat") == texts.kinds.count("self, list") == 4
    for at in range(22):  # the held-out windows among them, which are the last
        assert set(found[at : at + 4]) == {0, -1, 1}
    assert held_out_windows(32, ws.SearchSettings()) >= 3


def test_a_short_text_gives_what_it_has_and_is_spread_out(files):
    texts = Texts("demo", [str(files / "prose.txt"), str(files / "short.txt")], 32, 32 * 40)
    found = kinds(texts.windows(None, 0), files, ["prose.txt", "short.txt"])  # type: ignore[arg-type]
    few = [at for at, kind in enumerate(found) if kind == 1]
    assert found.count(0) == 20 and 3 <= len(few) < 8
    assert max(np.diff(few)) - min(np.diff(few)) <= 2 and texts.count == len(found)


@pytest.mark.parametrize(
    ("named", "tokens", "message"),
    [
        (["prose.txt", "prose.txt"], 640, "expected at least one text, and none twice"),
        (["prose.txt", "lists.txt"], 32, "tokens = 32: expected a window of 32 for each of 2 texts"),
        (["prose.txt", "none.txt"], 640, "none.txt: no such file"),
    ],
)
def test_what_cannot_be_mixed_is_refused(files, named, tokens, message):
    with pytest.raises(WisparseError, match=message):
        Texts("demo", [str(files / name) for name in named], 32, tokens)
