"""The wheel alone: unpacked away from the checkout it has all that the demo needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

# The demo as `wisparse demo` runs it, with uniform sparsity in place of every search.
CUT = """
import sys
from wisparse_jax import interruption
from wisparse_jax.search import SearchSettings
from wisparse_jax.cli import main
from wisparse_jax.inference import openers_for
from wisparse_jax.models.loading import load_tokenizer
from wisparse_jax.report import demo
assert all(sys.modules[name].__file__.startswith(sys.argv[1]) for name in ("wisparse_jax", "kernels_pallas"))
search = demo.calibrate
quick = lambda bits: "grinqh" if bits else "uniform"
demo.calibrate = lambda model, ids, p, name, *a, bits, **how: search(model, ids, p, quick(bits), *a, bits=bits, **how)
demo.SETTINGS = SearchSettings(window=32, tokens=128, statistics_tokens=64, gradient_tokens=64, compare_teal=False)
demo.EVALUATION_WINDOWS = 2
assert len(openers_for(load_tokenizer("demo")).kinds) > 10
main(["presets"])
main(["demo", "--out", "out"])
main(["report", "out/teal", "--out", "page"])
"""


def test_the_wheel_alone_runs_the_demo(repository: Path, tmp_path: Path) -> None:
    source, site, work = (tmp_path / name for name in ("source", "site", "work"))
    source.mkdir()
    work.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    for name in ("wisparse_jax", "kernels_pallas", "configs"):
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(repository / name, source / name, symlinks=True, ignore=without)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    shutil.rmtree(source)
    env = os.environ | {"PYTHONPATH": str(site), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, "-c", CUT, str(site)], cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quick: " in done.stdout and "all figures: out/evaluation.json" in " ".join(done.stdout.split())
    assert len(json.loads((work / "out" / "evaluation.json").read_text())) == 5
    assert (work / "page" / "index.html").stat().st_size > 10_000
