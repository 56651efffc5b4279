"""The two machines of lanes have the methods that `Machine` says, and no others; read off their sources."""

import ast

import pytest


def methods(file, name):
    """Public methods, and how they are called."""
    (found,) = (n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name)
    public = [f for f in found.body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_")]
    return {f.name: ([a.arg for a in f.args.args], [ast.unparse(d) for d in f.args.defaults]) for f in public}


@pytest.mark.parametrize(
    ("module", "name", "further"), [("mosaic", "Mosaic", set()), ("simulated", "Simulated", {"array"})]
)
def test_a_machine_has_the_methods_of_machines(repository, module, name, further):
    folder = repository / "kernels_pallas" / "lanes"
    expected, found = methods(folder / "machine.py", "Machine"), methods(folder / f"{module}.py", name)
    assert len(expected) > 50 and found.keys() - expected.keys() == further
    for method, call in expected.items():
        assert found[method] == call, method
