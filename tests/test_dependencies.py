"""Which parts of the library may know which: read off the imports, those inside functions included."""

import ast

import pytest

# What is on the left imports nothing of what is on the right, directly or through others.
FORBIDDEN = {
    "kernels_pallas": ["wisparse_jax"],
    "wisparse_jax.files": ["wisparse_jax.models", "wisparse_jax.sparsity", "wisparse_jax.search"],
    "wisparse_jax.models": ["wisparse_jax.sparsity", "wisparse_jax.calibration", "wisparse_jax.search"],
    "wisparse_jax.sparsity": ["wisparse_jax.calibration", "wisparse_jax.search", "wisparse_jax.evaluation"],
    "wisparse_jax.evaluation": ["wisparse_jax.calibration", "wisparse_jax.search", "wisparse_jax.inference"],
    "wisparse_jax.calibration": ["wisparse_jax.search", "wisparse_jax.evaluation", "wisparse_jax.inference"],
    "wisparse_jax.search": ["wisparse_jax.inference", "wisparse_jax.commands", "wisparse_jax.report"],
}
# Of what is imported when the module is, so that nothing reads models from disk or the net that need not.
FORBIDDEN_AT_ONCE = {"wisparse_jax.sparsity": ["wisparse_jax.models.hub", "wisparse_jax.models.loading"]}


def imports(root, at_once):
    """Module -> the modules of the two packages that it imports."""
    files = {}
    for package in ("kernels_pallas", "wisparse_jax"):
        for file in (root / package).rglob("*.py"):
            parts = file.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    graph = {}
    for name, file in files.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found = set()
        for node in tree.body if at_once else ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[name] = {one for one in found if one in files and one != name}
    return graph


def reachable(graph, package):
    seen, left = set(), [m for m in graph if m == package or m.startswith(f"{package}.")]
    while left:
        module = left.pop()
        if module not in seen:
            seen.add(module)
            # The root package's names are loaded on first use.
            left += [m for m in graph[module] if m != "wisparse_jax"]
    return seen


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_part_imports_what_is_built_on_it(repository, package):
    found = reachable(imports(repository, at_once=False), package)
    assert len(found) > 1
    bad = [m for m in found for other in FORBIDDEN[package] if m == other or m.startswith(f"{other}.")]
    assert not bad, f"{package} imports {sorted(bad)}"


@pytest.mark.parametrize("package", FORBIDDEN_AT_ONCE)
def test_nothing_is_loaded_that_reads_models(repository, package):
    found = reachable(imports(repository, at_once=True), package)
    assert not found & set(FORBIDDEN_AT_ONCE[package])
