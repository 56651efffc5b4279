"""The command keeps what it compiled, unless told otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wisparse_jax.compilation_cache import use_compilation_cache
from wisparse_jax.errors import WisparseError

VARIABLES = (
    "WISPARSE_COMPILATION_CACHE",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_ENABLE_COMPILATION_CACHE",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "JAX_COMPILATION_CACHE_MAX_SIZE",
)


@pytest.fixture
def environment(monkeypatch):
    """Without any setting of a cache, and restored afterwards."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in VARIABLES})
    return os.environ


def test_it_is_in_the_users_cache_directory(environment, tmp_path):
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    assert use_compilation_cache() == tmp_path / "wisparse" / "compiled"
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "wisparse" / "compiled")
    assert int(environment["JAX_COMPILATION_CACHE_MAX_SIZE"]) == 2 * 2**30


def test_an_option_comes_before_the_variable_and_the_variable_before_jax(environment, tmp_path):
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "jax")
    assert use_compilation_cache() == tmp_path / "jax"
    environment["WISPARSE_COMPILATION_CACHE"] = str(tmp_path / "variable")
    assert use_compilation_cache() == tmp_path / "variable"
    assert use_compilation_cache(str(tmp_path / "option")) == tmp_path / "option"
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "option")


def test_a_file_is_no_cache(environment, tmp_path):
    (tmp_path / "file").write_text("")
    environment["WISPARSE_COMPILATION_CACHE"] = str(tmp_path / "file")
    with pytest.raises(WisparseError, match="file: expected a folder, or off"):
        use_compilation_cache()


@pytest.mark.parametrize("by", ["option", "variable"])
def test_it_can_be_turned_off(environment, by):
    if by == "variable":
        environment["WISPARSE_COMPILATION_CACHE"] = "off"
    assert use_compilation_cache("off" if by == "option" else None) is None
    assert environment["JAX_ENABLE_COMPILATION_CACHE"] == "false" and "JAX_COMPILATION_CACHE_DIR" not in environment


PROGRAM = """
import sys
from wisparse_jax.compilation_cache import use_compilation_cache
use_compilation_cache(sys.argv[1])
import jax
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
import wisparse_jax as ws
model = ws.load(sys.argv[2])
print(ws.generate(model, [[5, 6]], max_new_tokens=3), sum(hits))
"""


def test_a_second_process_reads_what_the_first_compiled(repository, tmp_path):
    """The prefill and the decode loop; and writes the same text."""

    def run() -> tuple[str, int, list[str]]:
        settings = {k: v for k, v in os.environ.items() if k not in VARIABLES}
        # What compiles quickly is not kept otherwise, and whether it does depends on the machine.
        settings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        model = str(repository / "tests" / "fixtures" / "parity" / "llama2")
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), model]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=settings)
        text, hits = done.stdout.rsplit(maxsplit=1)
        return text, int(hits), sorted(file.name for file in Path(tmp_path).glob("*-cache"))

    first, second = run(), run()
    assert first[0] == second[0] and first[2] == second[2]
    assert first[1] == 0 and second[1] >= 2
    assert any("decode" in name for name in first[2]) and any("prefill" in name for name in first[2])
