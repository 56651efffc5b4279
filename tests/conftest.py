import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if jax.__version_info__ < (0, 11):
    # With XLA's older CPU emitters these tests compile in two thirds of the time; from jax 0.11 there are no others.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()

MOST_MAPPINGS = 40_000  # of the 65,530 that Linux allows unless told otherwise; every compiled program takes some

# Numbers of two types and arrays of two ranks meet only where the code says so; in processes of tests a user's own
# settings are not overridden.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """One cache of compiled programs for all workers, the processes that tests start, and the next run.

    It is pytest's own: `--cache-clear` empties it, `-p no:cacheprovider` does without. Nothing reaches the user's.
    """
    if not hasattr(config, "cache"):
        os.environ.setdefault("WISPARSE_COMPILATION_CACHE", "off")
        return
    settings = {
        "jax_compilation_cache_dir": str(config.cache.mkdir("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def pytest_collection_modifyitems(items):
    """Long tests first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_runtest_setup(item):
    """Most tests compile for longer than they run; on a CPU only the long ones are worth XLA's optimisations."""
    quick = jax.default_backend() == "cpu" and item.get_closest_marker("long") is None
    jax.config.update("jax_disable_most_optimizations", quick)


def pytest_runtest_teardown(item, nextitem):
    """Forget what was compiled before Linux refuses more mappings to one process: XLA dies of it by a signal."""
    maps, last = Path("/proc/self/maps"), nextitem is None or nextitem.path != item.path
    if last and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


def pytest_terminal_summary(terminalreporter):
    """What a green run says nothing about; `-rs`, as `make test` has it, lists the skipped tests and why."""
    skipped = len(terminalreporter.getreports("skipped"))
    others = " and ".join(f"3.{minor}" for minor in (11, 12, 13) if minor != sys.version_info.minor)
    terminalreporter.section("NOT RUN", yellow=True, bold=True)
    terminalreporter.line(f"{skipped} skipped tests and modules of tests; anything on Python {others}")


@pytest.fixture(scope="session")
def repository():
    """The checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def run_python():
    """Runs code with arguments in another Python, which imports what this one does; the process when it has ended."""

    def run(code, *arguments):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def tiny_config():
    from wisparse_jax.testing import tiny_config

    return tiny_config()


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    from wisparse_jax.testing import tiny_model

    return tiny_model(tiny_config)


@pytest.fixture(scope="session")
def tiny_tokens(tiny_config):
    """Four windows of 48 tokens."""
    return jax.random.randint(jax.random.key(1), (4, 48), 0, tiny_config.vocab_size)


@pytest.fixture(scope="session")
def demo():
    """The trained model that ships with the package, in float32."""
    import wisparse_jax as ws

    return ws.load("demo", dtype="float32")


@pytest.fixture(scope="session")
def demo_text(repository):
    """Windows that the demo model wrote, "calibration" and "held_out"; int32.

    By `sample_windows(demo, 16, 512, seed=0)` and `sample_windows(demo, 48, 512, seed=1)`; to write them again takes as
    long as a search.
    """
    with np.load(repository / "tests/fixtures/demo_text.npz") as file:
        return {name: file[name].astype(np.int32) for name in file}
