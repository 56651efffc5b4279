"""Converted checkpoints: weights by Orbax, next to the configuration and the tokenizer that they came with."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from wisparse_jax.errors import WeightsError, WisparseError
from wisparse_jax.files import check_new_folder, expanded, new_folder, read_bytes, read_json
from wisparse_jax.files.arrays import write_arrays
from wisparse_jax.files.reading import LARGE
from wisparse_jax.models import gguf, gguf_config, hub, tokenizer
from wisparse_jax.models.basis import Basis, fold
from wisparse_jax.models.config import LlamaConfig, parse_config, read_config
from wisparse_jax.models.fingerprint import digest, sample
from wisparse_jax.models.formats import check_offered
from wisparse_jax.models.mesh import param_shardings
from wisparse_jax.models.parameters import flat, param_shapes
from wisparse_jax.models.quantise import quantise_params, round_params
from wisparse_jax.models.stored_arrays import restore
from wisparse_jax.models.weights import place, read_weights

MANIFEST = "wisparse.json"
WEIGHTS = "weights"
FORMAT, VERSION = "wisparse-checkpoint", 2
LARGEST_FILE = 1 << 30  # bytes of a file beside the weights: configuration, tokenizer, a plan's tensors
_DTYPES = ("float32", "bfloat16")  # float16 would change the fingerprint, which is of numbers in bfloat16


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """What the manifest says of a stored tensor; checkpoints of version 1 have no digests."""

    dtype: Literal["float32", "float16", "bfloat16", "int8", "uint8"]
    shape: list[int]
    digest: str | None = None


@dataclasses.dataclass(frozen=True)
class _Manifest:
    format: Literal["wisparse-checkpoint"]
    version: Literal[1, 2]
    fingerprint: str
    tensors: dict[str, _Tensor]
    files: dict[str, str] = dataclasses.field(default_factory=dict)  # digests, by name
    weights: str | None = None  # the format that the block linears were rounded to
    head: str | None = None
    basis: str | None = None  # digest of the basis that the weights are folded into

    def __post_init__(self) -> None:
        check_offered(self.weights, self.head)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder was written by `convert`."""
    return os.path.lexists(folder / MANIFEST)


def stored_basis(folder: Path) -> str | None:
    """The digest of the basis that a folder's weights are folded into, None for those as they were.

    Raises:
        WeightsError: a manifest that cannot be read.
    """
    return read_json(folder / MANIFEST, _Manifest, WeightsError, LARGE).basis if is_checkpoint(folder) else None


def check_stored_dtype(dtype: str | None) -> None:
    """Refuse a kind of numbers that `convert` does not write.

    Raises:
        WisparseError: an unknown dtype.
    """
    if dtype not in (None, *_DTYPES):
        raise WisparseError(f"dtype = {dtype!r}: expected {' or '.join(_DTYPES)}, or nothing for the model's own")


def convert(
    name: str | Path,
    out: str | Path,
    weights: str | None = None,
    head: str | None = None,
    dtype: str | None = None,
    basis: Basis | None = None,
    beside: Mapping[str, bytes] | None = None,
    check: Callable[[str, LlamaConfig], None] | None = None,
    tokens: Any = None,
) -> None:
    """Write a model as an Orbax checkpoint folder: its weights as stored or rounded, configuration and tokenizer.

    The folder appears whole or not at all, with a digest of every tensor and file in it.

    Args:
        name: a folder (in Hugging Face format, or converted), a hub id, `demo`, or a GGUF file, whose quantised
            tensors become bfloat16, and with float32 asked for what they stand for exactly. What is rounded to
            integers is rounded from the exact values either way.
        out: the new folder; missing folders above it are made.
        weights: rounds the block linears to a format, such as "int8"; plans for the model apply as before.
        head: "int8" rounds the head.
        dtype: "float32" or "bfloat16" for weights that are not rounded to integers; None keeps each tensor's own.
        basis: a plan's, to fold the weights into before they are rounded.
        beside: further files to write, by name.
        check: called with the fingerprint and the architecture before anything is folded; raises to refuse.
        tokens: windows of text by which int4 weights make up for their rounding errors; see `quantise`.

    Raises:
        WisparseError: `out` exists or cannot be written, or the model cannot be read or rounded.
    """
    check_new_folder(out, WisparseError)
    check_stored_dtype(dtype)
    opened = _open_gguf if Path(name).suffix == gguf.SUFFIX else _open_folder
    exact = weights is not None or head is not None
    config, files, params, stored, kept = opened(name, dtype, exact)
    if check is not None:
        check(stored, config)
    if basis is not None:
        params = fold(config, params, basis, consume=True)
    run_in = "float32" if jax.default_backend() == "cpu" else None
    params = round_params(config, params, weights, head, tokens, run_in)
    if kept:
        params = _in_dtypes(params, kept, str(name))
    files |= beside or {}
    tensors = {
        path: {"dtype": leaf.dtype.name, "shape": list(leaf.shape), "digest": _digest(leaf)}
        for path, leaf in flat(params).items()
    }
    manifest = {"format": FORMAT, "version": VERSION, "fingerprint": stored, "tensors": tensors}
    folded = None if basis is None else basis.digest()
    written = {"weights": weights, "head": head, "basis": folded}
    manifest |= {kind: value for kind, value in written.items() if value is not None}
    manifest["files"] = {name: _digest(data) for name, data in files.items()}
    with new_folder(out, WisparseError) as folder:
        for name, data in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        # By path, not nested: then one tensor can be restored without the others.
        write_arrays(folder / WEIGHTS, flat(params), named=out)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _in_dtypes(params: dict[str, Any], kept: dict[str, str], where: str) -> dict[str, Any]:
    """What was not rounded to integers, in the dtype that it is kept in; the head of a tied model in its embedding's.

    Raises:
        WeightsError: values beyond that dtype.
    """
    made = {
        path: leaf
        if path.endswith(".scale") or jnp.issubdtype(leaf.dtype, jnp.integer)
        else place(leaf, kept.get(path, kept["embed"]), False, f"{where}: tensor {path}")
        for path, leaf in flat(params).items()
    }
    return jax.tree.unflatten(jax.tree.structure(params), list(made.values()))


# Of a model: its configuration, the files of it and of the tokenizer, its parameters, its fingerprint, and, where the
# parameters are to be exact, in which dtypes those that are not rounded afterwards are kept.
_Opened = tuple[LlamaConfig, dict[str, bytes], dict[str, Any], str, dict[str, str]]


def _open_folder(name: str | Path, dtype: str | None, exact: bool) -> _Opened:
    source = hub.resolve(name)
    if stored_basis(source) is not None:
        raise WisparseError(
            f"{source}: its weights are folded into a plan's basis already; convert the model as it was"
        )
    if rounded := is_checkpoint(source) and _kinds(read_json(source / MANIFEST, _Manifest, WeightsError, LARGE)):
        raise WisparseError(f"{source}: its weights are rounded to {rounded} already; convert the model as it was")
    config = read_config(source)
    params, stored = read_params(source, config, None if exact else dtype)
    kept = dict.fromkeys(flat(params), dtype) if exact and dtype is not None else {}
    names = [name for name in hub.CONFIG if (source / name).exists()] + tokenizer.files(source)
    files = {name: read_bytes(source / name, WisparseError, LARGEST_FILE) for name in names}
    return config, files, params, stored, kept


def _open_gguf(name: str | Path, dtype: str | None, exact: bool) -> _Opened:
    from wisparse_jax.models.gguf_tokenizer import tokenizer_files

    file = gguf.GgufFile(expanded(name))
    raw = gguf_config.hf_config(file)
    ends = {"bos_token_id": raw["bos_token_id"], "eos_token_id": gguf_config.end_tokens(file)}
    texts = {"config.json": raw, "generation_config.json": ends}
    files = {name: (json.dumps(text, indent=2) + "\n").encode() for name, text in texts.items()}
    config = parse_config(raw)
    params, stored = gguf.read_gguf(file, config, "float32" if exact else dtype)
    kept = gguf.kept_dtypes(file, config) if exact else {}
    if dtype is not None:
        kept = dict.fromkeys(kept, dtype)
    return config, files | tokenizer_files(file), params, stored, kept


def read_params(
    folder: Path, config: LlamaConfig, dtype: str | None = None, verify: bool = True, mesh: Mesh | None = None
) -> tuple[dict[str, Any], str]:
    """The parameters and the fingerprint of a model folder of either format; see `weights.read_weights`.

    `verify` is for `read_checkpoint`: Hugging Face folders hold no digests.
    """
    if is_checkpoint(folder):
        return read_checkpoint(folder, config, dtype, verify, mesh)
    return read_weights(folder, config, dtype, mesh)


def read_checkpoint(
    folder: Path, config: LlamaConfig, dtype: str | None = None, verify: bool = True, mesh: Mesh | None = None
) -> tuple[dict[str, Any], str]:
    """The parameters and the fingerprint of a folder that `convert` wrote; see `weights.read_weights`.

    Beside the model, memory holds at most `AHEAD` bytes of tensors as they are stored, or the largest one.

    Args:
        folder: the folder.
        config: the architecture.
        dtype: of the parameters; None keeps each tensor's own.
        verify: compare every tensor and file with its digest; some 0.1 s for every gigabyte. Of tensors that are spread
            over several hosts, none of which sees them whole, only the fingerprint is compared.
        mesh: the devices that the parameters are spread over; None is this host's first one.

    Raises:
        WeightsError: another version, or damaged: files, structure, values that are not finite or not those that
            were written.
    """
    manifest = read_json(folder / MANIFEST, _Manifest, WeightsError, LARGE)
    # As they are made, so that another kind of weights has other names and shapes.
    shapes = jax.eval_shape(lambda p: quantise_params(p, manifest.weights, manifest.head), param_shapes(config))
    leaves = flat(shapes)
    if differing := sorted(leaves.keys() ^ manifest.tensors.keys()):
        problem = "missing" if differing[0] in leaves else "unexpected"
        raise WeightsError(f"{folder}: tensor {differing[0]} is {problem}; config.json describes another model")
    for path, leaf in leaves.items():
        if (found := tuple(manifest.tensors[path].shape)) != leaf.shape:
            raise WeightsError(f"{folder}: tensor {path}: expected shape {leaf.shape}, found {found}")
    if verify:
        _check_files(folder, manifest.files)
    values: dict[str, jax.Array] = {}
    samples: dict[str, tuple[tuple[int, ...], np.ndarray]] = {}
    shardings = None if mesh is None else flat(param_shardings(config, shapes, mesh))
    stored_as = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(manifest.tensors[path].dtype)) for path, leaf in leaves.items()
    }
    for path, stored in restore(folder / WEIGHTS, stored_as, shardings):
        where = f"{folder / WEIGHTS}: tensor {path}"
        whole = isinstance(stored, np.ndarray) or stored.is_fully_addressable
        if verify and whole and manifest.tensors[path].digest not in (None, _digest(stored)):
            raise WeightsError(f"{where} is not the one that was converted: its values have another digest")
        samples[path] = (stored.shape, sample(stored))
        # Integers and what they are multiplied with stay what they are.
        kept = path.endswith(".scale") or jnp.issubdtype(stored.dtype, jnp.integer)
        values[path] = jnp.asarray(stored) if kept else place(stored, dtype, False, where)
    # Of rounded and of folded weights the fingerprint is that of the model as it was, which they do not tell.
    if not _kinds(manifest) and manifest.basis is None and (found := digest(config, samples)) != manifest.fingerprint:
        raise WeightsError(
            f"{folder}: the weights or the configuration are not those that were converted: expected fingerprint "
            f"{manifest.fingerprint}, found {found}"
        )
    return jax.tree.unflatten(jax.tree.structure(shapes), list(values.values())), manifest.fingerprint


def _kinds(manifest: _Manifest) -> str:
    """What the weights were rounded to, for a message; nothing for those as they were."""
    return " and ".join(kind for kind in (manifest.weights, manifest.head and f"{manifest.head} (head)") if kind)


def _digest(data: Any) -> str:
    """The digest of an array's bytes, by a hash that finds damage, not forgery, as fast as memory is read."""
    import xxhash

    whole: Any = data if isinstance(data, bytes) else np.ascontiguousarray(data).view(np.uint8)
    return xxhash.xxh3_128_hexdigest(whole)


def _check_files(folder: Path, files: dict[str, str]) -> None:
    for name, expected in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise WeightsError(f"{folder / MANIFEST}: files: expected names of files in the folder, found {name!r}")
        if _digest(read_bytes(folder / name, WeightsError, LARGEST_FILE)) != expected:
            raise WeightsError(f"{folder / name}: not the file that was converted: it has another digest")
