"""Converted checkpoints: weights by Orbax, next to the configuration and the tokenizer that they came with."""

from __future__ import annotations

import atexit
import contextlib
import json
import operator
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wisparse_jax.errors import WeightsError, WisparseError
from wisparse_jax.models import gguf, hub, tokenizer
from wisparse_jax.models.config import LlamaConfig, parse_config, read_config
from wisparse_jax.models.fingerprint import digest, flat, sample
from wisparse_jax.models.llama import param_shapes
from wisparse_jax.models.weights import place, read_weights

MANIFEST = "wisparse.json"
WEIGHTS = "weights"
FORMAT, VERSION = "wisparse-checkpoint", 1
_DTYPES = {"float32": jnp.float32, "float16": jnp.float16, "bfloat16": jnp.bfloat16}


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder was written by `convert`."""
    return (folder / MANIFEST).is_file()


def convert(name: str | Path, out: Path) -> None:
    """Write a model as an Orbax checkpoint folder: its weights as stored, configuration and tokenizer.

    The folder appears whole or not at all: it is written beside `out` under another name, and renamed at the end.
    An interruption takes effect once the weights on their way are written; nothing stays then.

    Args:
        name: a folder (in Hugging Face format, or converted), a hub id, `demo`, or a GGUF file, whose quantised
            tensors become bfloat16.
        out: the new folder.

    Raises:
        WisparseError: `out` exists, its parent does not, or the model cannot be read.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise WisparseError(f"{out} exists already; nothing is overwritten")
    if not out.absolute().parent.is_dir():
        raise WisparseError(f"{out}: the folder {out.absolute().parent} does not exist")
    write_texts, params, stored = (_open_gguf if Path(name).suffix == gguf.SUFFIX else _open_folder)(name)
    with _whole(out) as folder:
        write_texts(folder)
        _save(folder / WEIGHTS, params)
        tensors = {path: {"dtype": leaf.dtype.name, "shape": leaf.shape} for path, leaf in flat(params).items()}
        manifest = {"format": FORMAT, "version": VERSION, "fingerprint": stored, "tensors": tensors}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _open_folder(name: str | Path) -> tuple[Callable[[Path], None], dict[str, Any], str]:
    """What writes a model's configuration and tokenizer into a folder, its parameters, and its fingerprint."""
    source = hub.resolve(name)

    def write_texts(folder: Path) -> None:
        for file in ("config.json", "generation_config.json", *tokenizer.FILES):
            if (source / file).is_file():
                shutil.copyfile(source / file, folder / file)
        if (source / tokenizer.TEMPLATES).is_dir():
            shutil.copytree(source / tokenizer.TEMPLATES, folder / tokenizer.TEMPLATES)

    return write_texts, *read_params(source, read_config(source))


def _open_gguf(name: str | Path) -> tuple[Callable[[Path], None], dict[str, Any], str]:
    """The same of a GGUF file."""
    file = gguf.GgufFile(Path(name).expanduser())
    raw = gguf.hf_config(file)

    def write_texts(folder: Path) -> None:
        from wisparse_jax.models.gguf_tokenizer import write_tokenizer

        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        ends = json.dumps({"bos_token_id": raw["bos_token_id"], "eos_token_id": gguf.end_tokens(file)})
        (folder / "generation_config.json").write_text(ends + "\n", encoding="utf-8")
        write_tokenizer(file, folder)

    return write_texts, *gguf.read_gguf(file, parse_config(raw))


def read_params(folder: Path, config: LlamaConfig, dtype: str | None = None) -> tuple[dict[str, Any], str]:
    """The parameters and the fingerprint of a model folder of either format; see `weights.read_weights`."""
    return (read_checkpoint if is_checkpoint(folder) else read_weights)(folder, config, dtype)


def read_checkpoint(folder: Path, config: LlamaConfig, dtype: str | None = None) -> tuple[dict[str, Any], str]:
    """The parameters and the fingerprint of a folder that `convert` wrote; see `weights.read_weights`.

    Raises:
        WeightsError: another version, or damaged: files, structure, values that are not finite or not those that
            were written.
    """
    expected, tensors = _read_manifest(folder / MANIFEST)
    shapes = param_shapes(config)
    leaves = flat(shapes)
    if differing := sorted(leaves.keys() ^ tensors.keys()):
        problem = "missing" if differing[0] in leaves else "unexpected"
        raise WeightsError(f"{folder}: tensor {differing[0]} is {problem}; config.json describes another model")
    for path, leaf in leaves.items():
        if tensors[path].shape != leaf.shape:
            raise WeightsError(f"{folder}: tensor {path}: expected shape {leaf.shape}, found {tensors[path].shape}")
    values: dict[str, jax.Array] = {}
    samples: dict[str, tuple[tuple[int, ...], np.ndarray]] = {}
    for path, stored in _restore(folder / WEIGHTS, {path: tensors[path] for path in leaves}):
        samples[path] = (stored.shape, sample(stored))
        values[path] = place(stored, dtype, False, f"{folder / WEIGHTS}: tensor {path}")
    if (found := digest(config, samples)) != expected:
        raise WeightsError(
            f"{folder}: the weights or the configuration are not those that were converted: expected fingerprint "
            f"{expected}, found {found}"
        )
    return jax.tree.unflatten(jax.tree.structure(shapes), list(values.values())), expected


def _read_manifest(path: Path) -> tuple[str, dict[str, jax.ShapeDtypeStruct]]:
    """The fingerprint, and the shape and dtype of every stored tensor."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise WeightsError(f"{path}: expected an object with format = {FORMAT!r}, found another")
    if raw.get("version") != VERSION:
        raise WeightsError(f"{path}: expected version {VERSION}, found {raw.get('version')!r}")
    if not isinstance(raw.get("fingerprint"), str):
        raise WeightsError(f"{path}: fingerprint: expected a string, found {raw.get('fingerprint')!r}")
    try:
        tensors = {
            name: jax.ShapeDtypeStruct(tuple(map(operator.index, entry["shape"])), _DTYPES[entry["dtype"]])
            for name, entry in raw["tensors"].items()
        }
    except (KeyError, TypeError, AttributeError):
        raise WeightsError(f"{path}: tensors: expected the dtype and the shape of every tensor") from None
    return raw["fingerprint"], tensors


def _save(folder: Path, params: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    # By path, not nested: then one tensor can be restored without the others.
    with _signals_wait(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(folder.absolute(), args=ocp.args.PyTreeSave(flat(params)))


def _restore(folder: Path, tensors: dict[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, jax.Array]]:
    """The stored arrays in their own dtypes, one by one."""
    import orbax.checkpoint as ocp

    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder; the checkpoint is incomplete")
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        # One call for each: of many reads at once, those behind the first failure go on to complain by themselves.
        for path, leaf in tensors.items():
            item = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)}
            how = ocp.checkpoint_utils.construct_restore_args(item)
            args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
            try:
                array = reader.restore(folder.absolute(), args=args)[path]
            except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise WeightsError(
                    f"{folder}: tensor {path} is not readable by Orbax (damaged or incomplete?): {reason}"
                ) from None
            yield path, array


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` if the body ends well, and is removed if it does not, interruptions included."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        with _termination_raises():
            yield partial
            if os.path.lexists(out):
                raise WisparseError(f"{out} exists already; nothing is overwritten")
            partial.rename(out)
    except BaseException:
        # After a failed write Orbax's threads may write on; Python waits for them before it runs this.
        atexit.register(shutil.rmtree, partial, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _termination_raises() -> contextlib.AbstractContextManager[None]:
    """SIGTERM as an exception, so that clean-up runs; Python does so for SIGINT (Ctrl-C) only."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    return _handled(stop, signal.SIGTERM)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """SIGINT and SIGTERM once the body has ended: Orbax's threads cannot be stopped, and would write on."""
    came: list[int] = []
    try:
        with _handled(lambda number, frame: came.append(number), signal.SIGINT, signal.SIGTERM):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], object], *numbers: signal.Signals) -> Iterator[None]:
    """The handler of some signals while the body runs; only the main thread may, and need, set one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
