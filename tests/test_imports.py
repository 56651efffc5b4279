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
