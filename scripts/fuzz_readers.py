"""Mutated files for every reader: each must give a value, or one error of one line that names the file.

    python scripts/fuzz_readers.py --seconds 1200

Real files are changed by their structure (values, fields and numbers of a dictionary put in, taken out, repeated) and
by their bytes, drawn by hypothesis, which shrinks what fails. Prints how many inputs each reader refused and accepted,
the slowest of them and the largest memory.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import resource
import shutil
import struct
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from tiny_gguf import METADATA, gguf_maker

from wisparse_jax.errors import WisparseError
from wisparse_jax.models.basis import identity_basis
from wisparse_jax.models.checkpoint import convert, read_checkpoint
from wisparse_jax.models.config import LAYERS, parse_config, read_config
from wisparse_jax.models.gguf import GgufFile, read_gguf
from wisparse_jax.models.gguf_config import end_tokens, hf_config
from wisparse_jax.models.gguf_tokenizer import tokenizer_files
from wisparse_jax.models.loading import load, load_tokenizer, read_model_config
from wisparse_jax.models.weights import find_files, read_weights
from wisparse_jax.search import read_settings
from wisparse_jax.search.state import SearchState
from wisparse_jax.sparsity import SparsityPlan
from wisparse_jax.testing import write_tiny_folder

SLOWEST = 5.0  # seconds of this process that one input may take
# Put in place of the string that names them, so that no serialiser judges them first.
RAW = {
    "@400": "9" * 400,
    "@5000": "9" * 5000,
    "@exponent": "1e999999",
    "@nan": "NaN",
    "@infinity": "-Infinity",
    "@deep": "[" * 3000,
    "@deepest": '{"a":' * 100_000,
    "@surrogate": '"\\ud800"',
}
NUMBERS = [0, -1, 1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**7, 10**18, 0.0, 1e-9, 1e39, 1e308, 5e-324, -0.5, 1.5]
TEXTS = [
    "",
    "x",
    "\x00",
    "\x1b[2J\n",
    "\u2028",
    "é" * 300,
    "/etc/passwd",
    "../x",
    "!!int abc",
    "2001-99-99",
    "<<",
    "*a",
]
FIELDS = ["format", "version", "blocks", "q", "kernel", "shape", "dtype", "weight_map", "eos_token_id", "rope_scaling"]
BYTES = [
    b"\x00",
    b"\xff",
    b"{",
    b"[",
    b'"',
    b"\\",
    b":",
    b"-",
    b"1e9",
    b"\n",
    b"&a *a",
    b"!!bool x",
    b"\xef\xbb\xbf",
    b"? ",
]

Json = Any
values = st.one_of(
    st.sampled_from([*RAW, *TEXTS, *NUMBERS, None, True, False, [], {}]),
    st.recursive(
        st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=3),
        max_leaves=6,
    ),
)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A file among others in a folder, what reads it, and how it is written from a changed value."""

    file: Path
    read: Callable[[], object]
    dump: Callable[[Json], bytes] | None = None  # None: changed by its bytes alone
    parse: Callable[[bytes], Json] = json.loads
    share: float = 1.0  # of the inputs; less for what takes long


def as_json(value: Json) -> bytes:
    """JSON text, with the entries of `RAW` as they stand."""
    text = json.dumps(value)
    for name, fragment in RAW.items():
        text = text.replace(f'"{name}"', fragment)
    return text.encode()


def as_yaml(value: Json) -> bytes:
    """Flat YAML in the same way."""
    if not isinstance(value, dict):
        return as_json(value)
    return b"".join(as_json(str(key)) + b": " + as_json(entry) + b"\n" for key, entry in value.items())


def len_of(data: bytes) -> int:
    """The length of the header of a safetensors file."""
    return struct.unpack("<Q", data[:8])[0]


def header(data: bytes) -> Json:
    """The header of a safetensors file."""
    return json.loads(data[8 : 8 + len_of(data)])


def with_header(body: bytes) -> Callable[[Json], bytes]:
    """A safetensors file of another header before the same data."""
    return lambda value: struct.pack("<Q", len(as_json(value))) + as_json(value) + body


def readers(folder: Path) -> dict[str, Reader]:
    """Everything that this package reads, each on a copy of its own under `folder`."""
    plans = Path(__file__).resolve().parent.parent / "tests/fixtures/format-1/plan"
    write_tiny_folder(folder / "model")
    convert(folder / "model", folder / "converted")
    made: dict[str, Reader] = {}

    def work(name: str, source: Path) -> Path:
        return Path(shutil.copytree(source, folder / name))

    model = work("config", folder / "model")
    made["config"] = Reader(model / "config.json", lambda: read_config(model), as_json)
    ends = work("generation_config", folder / "model")
    (ends / "generation_config.json").write_text('{"eos_token_id": [2, 3], "temperature": 0.6}')
    made["generation_config"] = Reader(ends / "generation_config.json", lambda: read_model_config(ends), as_json)
    index = work("index", folder / "model")
    names = list(header((index / "model.safetensors").read_bytes()))
    (index / "model.safetensors").rename(index / "model-1.safetensors")
    entries = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (index / "model.safetensors.index.json").write_text(json.dumps(entries))
    made["index"] = Reader(index / "model.safetensors.index.json", lambda: find_files(index), as_json)
    old, plan = work("plan 1", plans), folder / "plan"
    made["plan 1"] = Reader(old / "plan.json", lambda: SparsityPlan.load(old), as_json, share=0.2)
    stated = SparsityPlan.load(old)
    dataclasses.replace(stated, realised=stated.sparsities, history={"notes": ["one"]}).save(plan)
    made["plan"] = Reader(plan / "plan.json", lambda: SparsityPlan.load(plan), as_json, share=0.3)
    made["history"] = Reader(plan / "history.json", lambda: SparsityPlan.load(plan), as_json, share=0.1)
    search = folder / "settings.yaml"
    search.write_text("window: 64\nsparse_share: 0.5\nalgorithm: SNES\nsearch_exponents: true\nexponent_step: 0.1\n")
    made["settings"] = Reader(search, lambda: read_settings(search), as_yaml, yaml.safe_load, share=0.5)
    # Without its weights every checkpoint ends in an error; all that stands before them is read.
    manifest = work("manifest", folder / "converted")
    shutil.rmtree(manifest / "weights")
    config = read_config(manifest)
    made["manifest"] = Reader(manifest / "wisparse.json", lambda: read_checkpoint(manifest, config), as_json)
    weights = work("weights", folder / "model")
    data = (weights / "model.safetensors").read_bytes()
    made["weights"] = Reader(
        weights / "model.safetensors",
        lambda: read_weights(weights, config),
        with_header(data[8 + len_of(data) :]),
        header,
        share=0.2,
    )
    stored = work("orbax", folder / "converted")
    largest = sorted((path for path in stored.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    for file in (stored / "weights/_METADATA", stored / "weights/manifest.ocdbt", largest[-1]):
        made[f"orbax {file.name[:9]}"] = Reader(file, lambda: load(stored), share=0.005)
    tokens = work("tokenizer", folder / "model")
    file = folder / "gguf" / "model.gguf"
    file.parent.mkdir()
    as_gguf = gguf_maker(folder / "gguf" / "scratch")
    file.write_bytes(as_gguf(METADATA))

    def read_file() -> object:
        opened = GgufFile(file)
        return tokenizer_files(opened), read_gguf(opened, parse_config(hf_config(opened))), end_tokens(opened)

    made["gguf"] = Reader(file, read_file, as_gguf, lambda _: METADATA, share=0.02)
    state = folder / "state"
    SearchState(state, "a" * 64)

    def resume() -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # where it says that a search goes on
            SearchState(state, "a" * 64)

    made["identity"] = Reader(state / "identity.json", resume, as_json, share=0.2)
    full = folder / "plan with tensors"
    config = read_config(folder / "model")
    vectors = [{name: jnp.ones(config.layer_shapes[name][0]) for name in LAYERS}] * len(stated.exponents)
    dataclasses.replace(stated, realised=stated.sparsities, gains=vectors, basis=identity_basis(config)).save(full)
    data = (full / "tensors.safetensors").read_bytes()
    made["tensors"] = Reader(
        full / "tensors.safetensors",
        lambda: load_signed(full),
        with_header(data[8 + len_of(data) :]),
        header,
        share=0.1,
    )
    made["tokenizer"] = Reader(tokens / "tokenizer.json", lambda: use(load_tokenizer(tokens)), as_json, share=0.005)
    return made


def load_signed(folder: Path) -> SparsityPlan:
    """A plan whose file of tensors is taken as it is."""
    text = json.loads((folder / "plan.json").read_text())
    text["tensors"] = hashlib.sha256((folder / "tensors.safetensors").read_bytes()).hexdigest()
    (folder / "plan.json").write_text(json.dumps(text))
    return SparsityPlan.load(folder)


def use(tokenizer: Any) -> None:
    """What a calibration does with a tokenizer."""
    tokenizer.decode(tokenizer.encode("The harbour, né 你 \U0001f600.\n"))


class Data(bytes):
    """A file's bytes, of which hypothesis shows the first."""

    def __repr__(self) -> str:
        return f"{self[:200]!r} and {len(self[200:])} more"


@st.composite
def mutated(draw: st.DrawFn, reader: Reader, original: bytes) -> bytes:
    """The original with a few changes of its structure, its bytes or both."""
    data = original
    if reader.dump is not None and draw(st.integers(0, 3)):
        value = copy.deepcopy(reader.parse(original))
        for _ in range(draw(st.integers(1, 3))):
            value = change(draw, value)
        data = reader.dump(value)
        if draw(st.integers(0, 3)):
            return data
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "insert", "cut", "repeat", "drop"]))
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + draw(st.sampled_from(BYTES) | st.binary(max_size=4)) + data[at:]
        elif kind == "cut":
            data = data[:at]
        elif kind == "repeat":
            data = data[:at] + data[at : at + 40] * draw(st.sampled_from([2, 3, 500])) + data[at + 40 :]
        else:
            data = data[:at] + data[at + draw(st.integers(1, 40)) :]
    return data


def change(draw: st.DrawFn, value: Json) -> Json:
    """One entry somewhere inside replaced, removed, added, renamed or repeated."""
    if not isinstance(value, dict | list) or not value or not draw(st.integers(0, 7)):
        return draw(values)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    kind = draw(st.sampled_from(["inside", "inside", "inside", "replace", "remove", "add", "rename", "repeat"]))
    if kind == "inside":
        value[key] = change(draw, value[key])
    elif kind == "replace":
        value[key] = draw(values)
    elif kind == "remove":
        del value[key]
    elif isinstance(value, list):
        value.insert(key, value[key] if kind == "repeat" else draw(values))
    elif kind == "rename":
        value[draw(st.sampled_from(TEXTS + FIELDS))] = value.pop(key)
    else:
        value[draw(st.sampled_from(TEXTS + FIELDS))] = value[key] if kind == "repeat" else draw(values)
    return value


def fuzz(reader: Reader, examples: int, seed: int, counts: collections.Counter[str]) -> float:
    """Try so many inputs; returns the seconds of the slowest.

    Raises:
        Exception: what a reader let through, with the smallest input found for it.
    """
    original, slowest = reader.file.read_bytes(), 0.0

    @seeded(seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=tuple(HealthCheck),  # pyright: ignore[reportArgumentType]
        phases=[Phase.generate, Phase.shrink],
    )
    @given(mutated(reader, Data(original)).map(Data))
    def attempt(data: bytes) -> None:
        nonlocal slowest
        reader.file.write_bytes(data)
        began = time.process_time()
        try:
            reader.read()
            counts["accepted"] += 1
        except WisparseError as error:
            line = str(error)
            assert line.isprintable() and len(line) < 1_100, line
            assert any(str(folder) in line for folder in reader.file.parents[:3]), line
            counts["refused"] += 1
        slowest = max(slowest, time.process_time() - began)
        assert slowest < SLOWEST, f"{slowest:.1f} s"

    try:
        attempt()
    finally:
        reader.file.write_bytes(original)
    return slowest


def main() -> None:
    """Fuzz every reader in turn until the time is over; exits with 1 if one let something through."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--examples", type=int, default=2000, help="of each reader in a round, times its share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="*", help="some of them; by default all")
    args = parser.parse_args()
    began, round_, wrong = time.perf_counter(), 0, 0
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    slowest: dict[str, float] = collections.defaultdict(float)
    with tempfile.TemporaryDirectory() as name:
        found = readers(Path(name))
        chosen = args.readers or list(found)
        while time.perf_counter() - began < args.seconds:
            for reader in chosen:
                examples = max(1, round(args.examples * found[reader].share))
                try:
                    took = fuzz(found[reader], examples, args.seed + round_, counts[reader])
                    slowest[reader] = max(slowest[reader], took)
                except Exception:
                    wrong += 1
                    lines = (line[:300] for line in traceback.format_exc(limit=-8).splitlines()[-60:])
                    print(f"{reader}, round {round_}:", *lines, sep="\n", flush=True)
                if time.perf_counter() - began > args.seconds:
                    break
            round_ += 1
    for reader, count in counts.items():
        print(f"{reader}: {dict(count)}, slowest {slowest[reader]:.2f} s")
    total = sum(count.total() for count in counts.values())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{total} inputs in {time.perf_counter() - began:.0f} s, {round_} rounds, {memory:.1f} GiB at most")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
