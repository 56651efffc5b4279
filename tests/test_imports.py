"""Importing the package and asking for help stay fast: what is heavy loads when it is used."""

import subprocess
import sys

import pytest

import wisparse_jax

HEAVY = ("orbax", "evosax", "transformers", "matplotlib")


def loaded_after(code):
    probe = f"{code}\nimport sys; print(*[m for m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(out.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("code", ["import wisparse_jax", "import wisparse_jax.cli"])
def test_importing_loads_nothing_heavy(code):
    assert not loaded_after(code) & {*HEAVY, "jax"}


def test_the_library_itself_loads_nothing_heavy():
    names = "wisparse_jax.search, wisparse_jax.inference, wisparse_jax.evaluation, wisparse_jax.models.loading"
    assert not loaded_after(f"import {names}") & set(HEAVY)


def test_every_public_name_exists():
    for name in wisparse_jax.__all__:
        assert getattr(wisparse_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = wisparse_jax.nonsense


def test_whatever_states_shapes_is_checked(repository, pytestconfig):
    """The modules are named one by one in pyproject.toml, so that a new one could be forgotten."""
    checked = pytestconfig.getoption("jaxtyping_packages").split(",")
    for package in ("kernels_pallas", "wisparse_jax"):
        for file in (repository / package).rglob("*.py"):
            name = ".".join(file.relative_to(repository).with_suffix("").parts)
            if "from jaxtyping import" in file.read_text(encoding="utf-8"):
                assert any(name == one or name.startswith(f"{one}.") for one in checked), name
