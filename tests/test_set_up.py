"""What `make` sets up: which Python, and which versions the checkers' verdict holds for."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement

MANAGERS = [
    ".pyenv/versions/3.12.1/bin",
    ".asdf/installs/python/3.12.1/bin",
    ".local/share/mise/installs/python/3.12/bin",
    ".local/share/uv/python/cpython-3.12.1-linux/bin",
    "miniconda3/bin",
    "miniforge3/envs/a name/bin",
]


def executable(folder, name, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(["#!/bin/sh", *lines, ""]))
    (folder / name).chmod(0o755)
    return str(folder / name)


def newest(repository, home, *path):
    folders = ("PYENV_ROOT", "ASDF_DATA_DIR", "MISE_DATA_DIR", "UV_PYTHON_INSTALL_DIR", "XDG_DATA_HOME")
    env = {name: value for name, value in os.environ.items() if name not in folders}
    env |= {"HOME": str(home), "PATH": os.pathsep.join(map(str, path))}
    command = [repository / "scripts" / "newest_python.sh"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("manager", MANAGERS)
def test_the_newest_python_that_starts_is_taken_wherever_it_is_kept(repository, tmp_path, manager):
    here = f'exec "{sys.executable}" "$@"'
    stubs, home = tmp_path / "stubs", tmp_path / "home"
    executable(stubs, "python3.13", "echo 'the command exists in these versions' >&2", "exit 127")
    older = executable(stubs, "python3", here)
    assert newest(repository, home, stubs) == older
    kept = executable(home / manager, "python3.13", here)
    assert newest(repository, home, stubs) == kept


@pytest.fixture
def requirements(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    every = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["dev"]])
    return [one for one in every if one.marker is None or one.marker.evaluate()]


def test_what_the_checkers_depend_on_has_an_upper_bound(requirements):
    """A release of tomorrow changes types: `make test` must say about a commit what it said when that landed."""
    bounded = {one.name for one in requirements if any(part.operator in ("<", "==") for part in one.specifier)}
    assert len(bounded) > 20 and bounded == {one.name for one in requirements}


def test_what_is_installed_is_within_the_bounds(requirements):
    assert not [f"{one}: {version(one.name)}" for one in requirements if version(one.name) not in one.specifier]
