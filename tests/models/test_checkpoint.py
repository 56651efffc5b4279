"""Converted checkpoints: nothing is lost, nothing is half written, damage is noticed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from wisparse_jax.errors import WeightsError, WisparseError
from wisparse_jax.models import checkpoint
from wisparse_jax.models.checkpoint import convert
from wisparse_jax.models.fingerprint import flat, model_fingerprint
from wisparse_jax.models.loading import load

TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 96, (2, 12)), jnp.int32)


@pytest.fixture
def converted(folder: Path, tmp_path: Path) -> Path:
    convert(folder, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_converted_equals_original_bit_for_bit(folder: Path, converted: Path, dtype: str) -> None:
    a, b = load(folder, dtype=dtype), load(converted, dtype=dtype)
    np.testing.assert_array_equal(a(TOKENS), b(TOKENS))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), a.params) == jax.tree.map(lambda x: (x.shape, x.dtype), b.params)
    assert model_fingerprint(a) == model_fingerprint(b)
    assert a.config == b.config


def test_tensors_keep_their_own_dtypes(tied: Path, tmp_path: Path) -> None:
    """A bf16 file with float32 norms loses nothing on the way to a float32 load."""
    tensors = load_file(tied / "model.safetensors")
    rng = np.random.default_rng(0)
    tensors["model.norm.weight"] = rng.standard_normal(64).astype(np.float32)
    save_file(tensors, tied / "model.safetensors")
    convert(str(tied), tmp_path / "out")
    np.testing.assert_array_equal(load(tied, "float32")(TOKENS), load(tmp_path / "out", "float32")(TOKENS))
    np.testing.assert_array_equal(load(tmp_path / "out", "float32").params["norm"], tensors["model.norm.weight"])


def test_a_checkpoint_can_be_converted_again(converted: Path, tmp_path: Path) -> None:
    convert(converted, tmp_path / "again")
    np.testing.assert_array_equal(load(converted)(TOKENS), load(tmp_path / "again")(TOKENS))


def test_config_and_tokenizer_files_travel_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    names = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "merges.txt"}
    for name in names:
        (folder / name).write_text("{}")
    (folder / "modeling.py").write_text("1 / 0")
    convert(folder, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == names | {"config.json", "wisparse.json", "weights"}


def test_the_folder_may_move(converted: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    moved = Path(shutil.move(converted, tmp_path / "deep" / "elsewhere"))
    shutil.rmtree(folder)
    assert load(moved)(TOKENS).shape == (2, 12, 96)


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_nothing_is_overwritten(folder: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
    if kind == "folder":
        (out / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WisparseError, match=re.escape(f"{out}: exists already; nothing is overwritten")):
        convert(folder, out)
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_parents_are_made(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "new" / "out")
    assert load(tmp_path / "new" / "out")(TOKENS).shape == (2, 12, 96)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("after", [False, True])
def test_an_interruption_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], after: bool
) -> None:
    real = checkpoint.write_arrays

    def save(*args: Any, **named: Any) -> None:
        if after:
            real(*args, **named)
        raise error

    monkeypatch.setattr(checkpoint, "write_arrays", save)
    with pytest.raises(error):
        convert(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_bad_source_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError):
        convert(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("number", "later"), [(signal.SIGINT, 0), (signal.SIGINT, 0.02), (signal.SIGTERM, 0.01)])
def test_signals_leave_nothing(folder: Path, tmp_path: Path, number: signal.Signals, later: float) -> None:
    """The real command, stopped while Orbax's threads write: up to 20 ms after their first file."""
    # What is killed may leave half a program in a cache.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "WISPARSE_COMPILATION_CACHE": "off"}
    out = tmp_path / "out"
    command = [sys.executable, "-m", "wisparse_jax", "convert", str(folder), str(out)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*/folder/weights*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(later)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    left = {p.name for p in tmp_path.iterdir()}
    if out.exists():  # it was faster than the signal: then it is whole
        assert left == {"model", "out"}
        assert load(out)(TOKENS).shape == (2, 12, 96)
    else:
        assert process.returncode == 128 + number and len(err.splitlines()) == 1
        assert left == {"model"}


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    for i in range(len(data) // 3, len(data)):
        data[i] ^= 0x55
    file.write_bytes(data)


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(out: Path) -> None:
        raw = json.loads((out / "wisparse.json").read_text())
        change(raw)
        (out / "wisparse.json").write_text(json.dumps(raw))

    return apply


UNREADABLE = "is not readable by Orbax (damaged or incomplete?): "
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda out: shutil.rmtree(out / "weights"), "weights: no such folder; the checkpoint is incomplete"),
    "empty weights": (lambda out: (shutil.rmtree(out / "weights"), (out / "weights").mkdir()), UNREADABLE),
    "metadata damaged": (lambda out: damage(out / "weights" / "_METADATA"), UNREADABLE),
    "manifest of the data gone": (lambda out: (out / "weights" / "manifest.ocdbt").unlink(), UNREADABLE),
    "data gone": (lambda out: [p.unlink() for p in (out / "weights").glob("ocdbt.process_*/d/*")], UNREADABLE),
    "data damaged": (lambda out: [damage(p) for p in (out / "weights").glob("ocdbt.process_*/d/*")], UNREADABLE),
    "not JSON": (lambda out: (out / "wisparse.json").write_text("{"), "wisparse.json: not readable as JSON"),
    "another format": (
        manifest(lambda raw: raw.update(format="x")),
        "wisparse.json: format = 'x': expected 'wisparse-checkpoint'",
    ),
    "another version": (manifest(lambda raw: raw.update(version=3)), "wisparse.json: version = 3: expected 1 or 2"),
    "no fingerprint": (
        manifest(lambda raw: raw.pop("fingerprint")),
        "wisparse.json: fingerprint: expected a value, found nothing",
    ),
    "another fingerprint": (
        manifest(lambda raw: raw.update(fingerprint="abc")),
        "are not those that were converted: expected fingerprint abc, found ",
    ),
    "no tensors": (manifest(lambda raw: raw.pop("tensors")), "wisparse.json: tensors: expected a value, found nothing"),
    "integers": (
        manifest(lambda raw: raw["tensors"]["embed"].update(dtype="int16")),
        "wisparse.json: tensors.embed.dtype = 'int16': expected",
    ),
    "a tensor less": (manifest(lambda raw: raw["tensors"].pop("embed")), "tensor embed is missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_error(converted: Path, case: str) -> None:
    change, message = DAMAGE[case]
    change(converted)
    with pytest.raises(WeightsError, match=re.escape(message)) as caught:
        load(converted)
    assert str(converted) in str(caught.value)


def test_damage_is_one_line_that_names_a_tensor(
    converted: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Many tensors are read at once, and all of those reads fail."""
    DAMAGE["data gone"][0](converted)
    done = run_python(
        "import sys\nfrom wisparse_jax.cli import main\nmain(['convert', *sys.argv[1:]])", converted, "out"
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"wisparse: error: {converted / 'weights'}: tensor blocks.0.")
    assert UNREADABLE in done.stderr


@pytest.mark.parametrize("ahead", [1, 30_000, 1 << 30])
def test_tensors_are_read_together_as_far_as_memory_allows(
    folder: Path, converted: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """Each call reads the metadata of all of them."""
    import orbax.checkpoint as ocp

    sizes, restore = [], ocp.Checkpointer.restore

    def counted(*given: Any, **how: Any) -> Any:
        found = restore(*given, **how)
        sizes.append([value.nbytes for value in found.values()])
        return found

    monkeypatch.setattr(ocp.Checkpointer, "restore", counted)
    monkeypatch.setattr("wisparse_jax.models.stored_arrays.AHEAD", ahead)
    jax.tree.map(np.testing.assert_array_equal, load(converted).params, load(folder).params)
    leaves = len(flat(load(folder).params))
    assert sum(map(len, sizes)) == leaves and all(len(size) == 1 or sum(size) <= ahead for size in sizes)
    assert {1: len(sizes) == leaves, 30_000: 1 < len(sizes) < leaves, 1 << 30: len(sizes) == 1}[ahead]


def test_changed_values_are_noticed(converted: Path) -> None:
    """Written anew by Orbax itself, so that only the digest can tell."""
    import orbax.checkpoint as ocp

    params = flat(load(converted, "bfloat16").params)
    name = "blocks.1.up.kernel"
    changed = params[name].at[5, 7].multiply(1.01)
    assert (changed != params[name]).sum() == 1
    shutil.rmtree(converted / "weights")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save((converted / "weights").absolute(), args=ocp.args.PyTreeSave(params | {name: changed}))
    message = f"{converted / 'weights'}: tensor {name} is not the one that was converted: its values have another"
    with pytest.raises(WeightsError, match=re.escape(message)):
        load(converted)
    np.testing.assert_array_equal(flat(load(converted, "bfloat16", verify=False).params)[name], changed)


def test_flipped_bits_change_nothing_or_are_refused(converted: Path, folder: Path) -> None:
    expected = load(folder).params
    files = [path for path in converted.rglob("*") if path.is_file()]
    sizes = np.array([path.stat().st_size for path in files])
    rng, refused = np.random.default_rng(0), 0
    for at in rng.integers(0, sizes.sum(), 12):
        file = files[int(np.searchsorted(np.cumsum(sizes), at, side="right"))]
        before = file.read_bytes()
        data = bytearray(before)
        data[at % len(data)] ^= 1 << rng.integers(8)
        file.write_bytes(data)
        try:
            found = load(converted).params
        except WisparseError:
            refused += 1
        else:
            jax.tree.map(np.testing.assert_array_equal, found, expected)
        file.write_bytes(before)
    assert refused > 6


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_changed_files_are_noticed(folder: Path, tmp_path: Path, name: str) -> None:
    for file in ("generation_config.json", "tokenizer.json"):
        (folder / file).write_text("{}")
    convert(folder, tmp_path / "out")
    with open(tmp_path / "out" / name, "a") as file:
        file.write(" ")
    with pytest.raises(WeightsError, match=re.escape(f"{tmp_path / 'out' / name}: not the file that was converted")):
        load(tmp_path / "out")
    load(tmp_path / "out", verify=False)


def test_digests_cannot_be_of_files_elsewhere(converted: Path) -> None:
    manifest(lambda raw: raw["files"].update({"../model/config.json": "0"}))(converted)
    with pytest.raises(WeightsError, match=r"expected names of files in the folder, found '\.\./model/config.json'"):
        load(converted)


def test_checkpoints_of_version_1_load(repository: Path) -> None:
    old = repository / "tests" / "fixtures" / "format-1" / "checkpoint"
    assert json.loads((old / "wisparse.json").read_text())["version"] == 1
    assert load(old)(TOKENS).shape == (2, 12, 96)


def test_a_disk_that_is_full(
    folder: Path, tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """A limit on the size of files, which fails in Orbax's threads as a full disk does."""
    code = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from wisparse_jax.cli import main\nmain(['convert', sys.argv[1], sys.argv[2]])"
    )
    done = run_python(code, folder, tmp_path / "out")
    assert done.returncode == 2 and {p.name for p in tmp_path.iterdir()} == {"model"}
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"wisparse: error: {tmp_path / 'out'}: cannot be written by Orbax: ")


@pytest.mark.parametrize("name", ["wisparse.json", "config.json", "weights/pipe"])
def test_pipes_are_refused(converted: Path, name: str) -> None:
    (converted / name).unlink(missing_ok=True)
    os.mkfifo(converted / name)
    with pytest.raises(WisparseError, match=re.escape(f"{converted / name}: not a regular file")):
        load(converted)


CONFIG_CHANGES = {
    "more blocks": ({"num_hidden_layers": 3}, r"tensor blocks\.2\..* is missing; config.json describes"),
    "tied": ({"tie_word_embeddings": True}, "tensor lm_head is unexpected; config.json describes"),
    "vocabulary": ({"vocab_size": 97}, r"tensor embed: expected shape \(97, 64\), found \(96, 64\)"),
    "rope": ({"rope_theta": 1e4}, "config.json: not the file that was converted"),
}


@pytest.mark.parametrize("case", CONFIG_CHANGES)
def test_weights_of_another_configuration_are_refused(converted: Path, case: str) -> None:
    change, message = CONFIG_CHANGES[case]
    raw = json.loads((converted / "config.json").read_text())
    (converted / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(WeightsError, match=message):
        load(converted)


@pytest.mark.parametrize(("weights", "head"), [("int4", None), ("int8", "int8"), ("int4+2+2", None)])
def test_rounded_weights_are_stored_rounded(tmp_path: Path, folder: Path, weights: str, head: str | None) -> None:
    """What is read back is bit for bit what rounding gives, under the fingerprint of the model as it was."""
    convert(folder, tmp_path / "out", weights, head)
    expected, found = load(folder, "float32", weights, head=head), load(tmp_path / "out", "float32")
    for a, b in zip(jax.tree.leaves(expected.params), jax.tree.leaves(found.params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert found.fingerprint == expected.fingerprint
    with pytest.raises(WisparseError, match="rounded to integers already"):
        load(tmp_path / "out", "float32", weights)
    with pytest.raises(WisparseError, match=rf"rounded to {re.escape(weights)} (and int8 .head. )?already"):
        convert(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize("uvloop", [False, True])
def test_in_a_notebook_whose_event_loop_runs(folder: Path, tmp_path: Path, uvloop: bool, run_python: Any) -> None:
    """Orbax needs uvloop to be called there, which not every installation has."""
    program = f"""
import asyncio, sys
if not {uvloop}:
    sys.modules["uvloop"] = None
from wisparse_jax.models.checkpoint import convert
from wisparse_jax.models.loading import load

async def cell():
    convert({str(folder)!r}, {str(tmp_path / "out")!r})
    print(load({str(tmp_path / "out")!r}).fingerprint == load({str(folder)!r}).fingerprint)

asyncio.run(cell())
"""
    done = run_python(program)
    assert (done.stdout.strip(), done.returncode) == ("True", 0), done.stderr
