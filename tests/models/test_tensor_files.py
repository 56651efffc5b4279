"""Tensors are read past the safetensors library, some at once; files that change meanwhile are seen."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from wisparse_jax.errors import WeightsError
from wisparse_jax.models import tensor_files, weights
from wisparse_jax.models.config import read_config
from wisparse_jax.models.fingerprint import flat
from wisparse_jax.models.loading import load
from wisparse_jax.models.parameters import hf_name, param_shapes
from wisparse_jax.models.tensor_files import Tensor, read_tensor

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_are_read_as_the_library_reads_them(folder: Path, stored: Any) -> None:
    file = folder / "model.safetensors"
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(value.shape).astype(stored) for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with safe_open(file, framework="numpy") as library:
        for name in tensors:
            expected = library.get_tensor(name)
            found = read_tensor(Tensor(file, name, ""), expected.shape, False)
            assert (found.dtype, found.shape) == (stored, expected.shape)
            assert found.tobytes() == expected.tobytes()


def test_at_most_three_tensors_are_on_their_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each is more than may be read ahead: one is read, one waits or is placed, one is checked."""
    import gc
    import weakref

    alive: list[Any] = []
    real, lock = weights.read_tensor, threading.Lock()

    def read(*args: Any) -> np.ndarray:
        with lock:
            if sum(ref() is not None for ref in alive) > 2:
                gc.collect()  # a transfer that has just ended may leave a cycle
            assert sum(ref() is not None for ref in alive) <= 2
            array = real(*args)
            alive.append(weakref.ref(array))
            return array

    monkeypatch.setattr(weights, "read_tensor", read)
    monkeypatch.setattr(weights, "AHEAD", 0)
    load(folder, dtype="float16")
    assert len(alive) == len(flat(param_shapes(read_config(folder))))


def test_a_file_that_is_cut_while_it_is_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "model.safetensors"
    real = tensor_files.check_piece

    def check(tensor: Tensor, *rest: Any) -> None:
        real(tensor, *rest)
        if tensor.name == Q:
            os.truncate(file, 100_000)

    monkeypatch.setattr(tensor_files, "check_piece", check)
    with pytest.raises(WeightsError, match=re.escape(f"{file}: not readable as safetensors")):
        load(folder)


@pytest.mark.parametrize("other", ["float32", "tensors of other names", "no JSON"])
def test_a_file_that_is_replaced_while_it_is_opened_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """The library opens it again: offsets of one file are not used for the bytes of another."""
    file, first = folder / "model.safetensors", folder / "first.safetensors"
    with safe_open(file, framework="numpy") as library:
        expected = library.get_tensor(Q)
    stored = load_file(file)
    if other == "float32":
        save_file({name: value.astype(np.float32) for name, value in stored.items()}, first)
    elif other == "no JSON":
        first.write_bytes((1_000).to_bytes(8, "little") + bytes(2_000))
    else:
        save_file({f"other.{name}": value for name, value in stored.items()}, first)
    opened = open
    monkeypatch.setattr(tensor_files, "open", lambda path, mode: opened(first, mode), raising=False)
    with pytest.raises(WeightsError, match=re.escape(f"{file}: not readable as safetensors") + f".*tensor {Q}"):
        read_tensor(Tensor(file, Q, ""), expected.shape, False)


def test_a_header_whose_entries_are_lists_is_refused(tmp_path: Path) -> None:
    """The library takes them for objects."""
    file, header = tmp_path / "model.safetensors", b'{"x":["F32",[6],[0,24]]}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    with pytest.raises(WeightsError, match=re.escape(f"{file}: not readable as safetensors")):
        read_tensor(Tensor(file, "x", ""), (6,), False)


def test_an_interruption_waits_for_no_reader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    going_on = threading.Event()

    def read(tensor: Tensor, *_: Any) -> np.ndarray:
        begun.append(tensor.name)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        going_on.wait(60)
        raise OSError

    monkeypatch.setattr(weights, "read_tensor", read)
    # A shell that runs the tests in the background has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            load(folder)
    finally:
        signal.signal(signal.SIGINT, before)
    going_on.set()
    readers = [thread for thread in threading.enumerate() if thread.name.startswith("weights")]
    for thread in readers:
        thread.join(10)
    assert not any(thread.is_alive() for thread in readers)
    assert len(begun) <= weights.READERS  # those behind them never began


PEAK = """
import re, sys, jax
from pathlib import Path
from wisparse_jax.models import weights
from wisparse_jax.models.loading import load
weights.AHEAD = 16 << 20
def status(field): return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
load(sys.argv[1], "float32")  # what imports and compilation take is not the model's
before = status("VmRSS")
params = jax.block_until_ready(load(sys.argv[2], "float32").params)
sizes = [leaf.nbytes / 2**20 for leaf in jax.tree.leaves(params)]
print(status("VmHWM") - before, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_peak_memory_is_the_model_and_what_is_on_its_way(
    folder: Path,
    tmp_path: Path,
    run_python: Callable[..., subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = json.loads((folder / "config.json").read_text())
    big = tmp_path / "big"
    big.mkdir()
    raw |= {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4, "vocab_size": 1000}
    (big / "config.json").write_text(json.dumps(raw))
    tensors = {}
    for path, leaf in flat(param_shapes(read_config(big))).items():
        shape = leaf.shape[::-1] if weights.transposed(path) else leaf.shape
        tensors[hf_name(path)] = np.full(shape, 0.5, np.float32)
    save_file(tensors, big / "model.safetensors")
    # A thread's arena keeps what was freed in it: one for all threads, and the least of six runs, or the first that
    # is within the bound; a model held twice never is.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    runs, peak, model, largest = [], math.inf, 0.0, 0.0
    for _ in range(6):
        runs.append(run_python(PEAK, folder, big))
        assert not runs[-1].returncode, runs[-1].stderr
        peak, model, largest = map(float, runs[-1].stdout.split())
        if peak < model + 2 * 16 + largest + 100:
            break
    (big / "model.safetensors").unlink()
    assert model > 190
    # MiB; the rest, 20 to 100, is the runtime's.
    assert peak < model + 2 * 16 + largest + 100, [done.stdout for done in runs]
