"""The notebook runs from a clean kernel, and what it shows is committed with it."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

# Jupyter's libraries are not ours to keep free of warnings.
pytestmark = pytest.mark.filterwarnings("ignore")

NOTEBOOK = Path(__file__).parent.parent / "examples" / "from_model_to_plots.ipynb"
LARGEST = 300_000  # bytes, pictures included


def shown(notebook):
    """The texts and the pictures that the cells put out."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    return texts, sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_notebook_runs(tmp_path, monkeypatch):
    assert NOTEBOOK.stat().st_size < LARGEST
    committed = nbformat.read(NOTEBOOK, 4)
    notebook = nbformat.from_dict(committed)
    for name, value in {"PYTHONPATH": str(Path.cwd()), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    before = shown(committed)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts, pictures = shown(notebook)
    assert pictures == before[1] == 2
    for found in (texts, before[0]):
        (said,) = re.findall(r"KL of second-order minus uniform: (\S+) ± (\S+)", found)
        gap, error = map(float, said)
        assert gap < -3 * error < 0
