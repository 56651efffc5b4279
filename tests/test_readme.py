"""README's example runs as it is written: on a tiny model, on a small part of the text and with next to no search."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wisparse_jax as ws
from wisparse_jax import inference
from wisparse_jax.models import hub
from wisparse_jax.search import SearchSettings
from wisparse_jax.testing import write_tiny_folder

LEAST = {
    "absolute_steps": 2,
    "skipped_steps": 2,
    "heads_steps": 2,
    "gradient_tokens": 64,
    "training_steps": 2,
    "statistics_tokens": 64,
    "compare_teal": False,
}


@pytest.fixture
def example(repository: Path) -> str:
    """The code of the section on use."""
    section = (repository / "README.md").read_text(encoding="utf-8").split("## Use it")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


def test_the_example_runs(
    example: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []

    def sample_windows(model: Any, windows: int, length: int, seed: int) -> np.ndarray:
        asked.append((windows, length, seed))
        return sample(model, 4, 48, seed)

    def preset(name: str) -> SearchSettings:
        asked.append(name)
        return SearchSettings(**LEAST)

    def generate(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        asked.append(max_new_tokens)
        return write(model, prompts, max_new_tokens=4)

    write_tiny_folder(tmp_path / "model")
    monkeypatch.setattr(hub, "resolve", lambda *_: tmp_path / "model")
    sample, write = inference.sample_windows, ws.generate
    monkeypatch.setattr(inference, "sample_windows", sample_windows)
    monkeypatch.setattr(ws, "preset", preset, raising=False)
    monkeypatch.setattr(ws, "generate", generate, raising=False)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    (first, chosen, second, new) = asked
    assert first == (16, 512, 0) and second == (8, 512, 1) and new == 40
    assert chosen == "quick"
    plan = ws.SparsityPlan.load(tmp_path / "plan")
    assert plan.method == "wisparse-plus" and plan.target == 0.5 and plan.mean_sparsity == pytest.approx(0.5)
    held_out, figures, text = capsys.readouterr().out.split("\n", 2)
    ((plan_kl, uniform_kl),) = re.findall(r"^held-out KL ([\d.]+), with uniform sparsity ([\d.]+)$", held_out)
    assert float(plan_kl) == pytest.approx(plan.held_out["plan"]["kl"], abs=1e-4) and float(uniform_kl) > 0
    assert text.strip()
    dense, kl, sparsity = (float(number) for number in re.findall(r"([\d.]+) ± ", figures))
    assert dense > 1 and kl > 0 and 0.3 < sparsity < 0.7
