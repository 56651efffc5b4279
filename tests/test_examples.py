"""Every example runs as its first lines say, and checks itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
SAYS = {
    "evaluation_on_two_devices": r"2 devices: perplexity (\d+\.\d{2})\d\d; one device: \1\d\d",
    "jitted_generation": r".{40,}",
    "own_allocator": r"(?:(?:uniform|ramp|second-order) +mean sparsity 0\.500000  KL 0\.\d{4} ± 0\.\d{4}\n?){3}",
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example):
    settings = os.environ | {"PYTHONPATH": str(example.parent.parent), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(SAYS[example.stem], done.stdout.strip(), re.DOTALL)
    assert f"python examples/{example.name}" in example.read_text()
