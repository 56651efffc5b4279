"""Weights of a Hugging Face folder: safetensors in, the plain parameter pytree out, one tensor at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool

from wisparse_jax.errors import WeightsError
from wisparse_jax.files import check_regular, read_json, shown
from wisparse_jax.files.reading import LARGE
from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.fingerprint import digest, in_bfloat16, sample, sampled
from wisparse_jax.models.mesh import param_shardings
from wisparse_jax.models.parameters import flat, hf_name, param_shapes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Constants that old checkpoints carry; the configuration gives them.
IGNORED = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]  # tensor name -> file name


_DTYPES = ("BF16", "F16", "F32")
_EMBED, _HEAD = hf_name("embed"), hf_name("lm_head")


def read_weights(
    folder: Path, config: LlamaConfig, dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[dict[str, Any], str]:
    """Read the safetensors of a folder onto the default device, tensor by tensor, or straight into parts on a mesh.

    Host memory holds at most the model and its largest tensor; of a mesh's devices each gets its own part alone, and no
    host reads more than its devices hold.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and its shards.
        config: the architecture, which says what tensors there must be.
        dtype: of the parameters; None keeps each tensor's own.
        mesh: the devices that the parameters are spread over; None is the default device.

    Returns:
        The parameters (block weights and lm_head `[in, out]`, embedding `[vocab, hidden]`) and the fingerprint of
        the values as stored.

    Raises:
        WeightsError: a file or tensor is missing, unexpected, mis-shaped, of another dtype, non-finite or damaged;
            names the file and the tensor.
    """
    shapes = param_shapes(config)
    leaves = flat(shapes)
    shardings = {} if mesh is None else flat(param_shardings(config, shapes, mesh))
    wanted = {hf_name(path): path for path in leaves}
    values: dict[str, Array] = {}
    samples: dict[str, tuple[tuple[int, ...], np.ndarray]] = {}
    heads: dict[str, tuple[Path, str]] = {}  # where: a tied model's embedding and the copy of it that some files hold
    files = find_files(folder)
    for file, promised in files.items():
        names = _names(file)
        if absent := sorted((promised or set()) - names):
            raise WeightsError(f"{file}: tensor {absent[0]} is missing; {INDEX} says that it is in this file")
        for name in sorted(names):
            if IGNORED.fullmatch(name):
                continue
            if promised is not None and name not in promised:
                raise WeightsError(f"{file}: tensor {name} is unexpected; {INDEX} does not list it here")
            # Checkpoints of a model without its head have no prefix.
            full = name if name in wanted or name == _HEAD else f"model.{name}"
            if config.tied_embeddings and full in (_EMBED, _HEAD):
                heads[full] = (file, name)
            if config.tied_embeddings and full == _HEAD:
                continue
            if full not in wanted or wanted[full] in values:
                reason = "there is another of it" if full in wanted else "the model in config.json has none"
                raise WeightsError(f"{file}: tensor {name} is unexpected; {reason}")
            path = wanted[full]
            if path in shardings:
                made = _read_parts(file, name, leaves[path].shape, transposed(path), shardings[path], dtype)
                values[path], samples[path] = made[0], (leaves[path].shape, made[1])
                continue
            stored = _read(file, name, leaves[path].shape, transposed(path))
            samples[path] = (leaves[path].shape, sample(stored.T if transposed(path) else stored))
            values[path] = place(stored, dtype, transposed(path), f"{file}: tensor {name}")
            del stored
    if absent := [hf_name(path) for path in leaves if path not in values]:
        listed = ", ".join(file.name for file in files)
        raise WeightsError(f"{folder}: tensor {absent[0]} is missing ({len(absent)} in all); searched {listed}")
    if len(heads) == 2:
        _check_tied(heads)
    return jax.tree.unflatten(jax.tree.structure(shapes), [values[path] for path in leaves]), digest(config, samples)


def transposed(path: str) -> bool:
    """Whether a parameter is stored `[out, in]`: every matrix but the embedding."""
    return path == "lm_head" or path.endswith(".kernel")


def find_files(folder: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a folder, each with the tensors that the index promises there (None: no index).

    Raises:
        WeightsError: no safetensors, or an index that is damaged or points outside the folder.
    """
    if (folder / SINGLE).exists():
        return {folder / SINGLE: None}
    index = folder / INDEX
    if not index.exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"found only {', '.join(pickles)}: pickle files are never opened" if pickles else "found neither"
        raise WeightsError(f"{folder}: no weights: expected {SINGLE} or {INDEX}, {found}")
    promised: dict[str, set[str]] = {}
    for name, shard in _entries(index).items():
        if IGNORED.fullmatch(name):
            continue
        if not os.path.exists(folder / shard):
            raise WeightsError(f"{folder / shard}: no such file; {INDEX} says that it holds tensor {name}")
        promised.setdefault(shard, set()).add(name)
    return {folder / shard: promised[shard] for shard in sorted(promised)}


def shards(folder: Path) -> list[str]:
    """The names of the files that a folder's index lists, whether they are there or not.

    Raises:
        WeightsError: an index that is damaged or points outside the folder.
    """
    return sorted(set(_entries(folder / INDEX).values()))


def _entries(index: Path) -> dict[str, str]:
    entries = read_json(index, _Index, WeightsError, LARGE).weight_map
    if not entries:
        raise WeightsError(f"{index}: weight_map: expected the names of tensors and files, found an empty object")
    for name, shard in entries.items():
        if not _inside(shard):
            raise WeightsError(
                f"{index}: tensor {name}: expected the name of a .safetensors file in the folder, found {shown(shard)}"
            )
    return entries


def place(stored: Any, dtype: str | None, transpose: bool, where: str) -> Array:
    """A tensor on the default device, transposed and cast there; the host copy can go when this returns.

    Raises:
        WeightsError: NaN or infinity, stored or from the cast; the message begins with `where`.
    """
    out, finite, fits = _finish(stored, dtype=np.dtype(jnp.dtype(dtype or stored.dtype)), transpose=transpose)
    if not finite:
        raise WeightsError(f"{where} is not finite: expected numbers, found NaN or infinity")
    if not fits:
        raise WeightsError(f"{where} does not fit: found values beyond the range of {dtype}")
    return out


@functools.partial(jax.jit, static_argnames=("dtype", "transpose"))
def _finish(x: Array, dtype: Any, transpose: bool) -> tuple[Array, Bool[Array, ""], Bool[Array, ""]]:
    out = (x.T if transpose else x).astype(dtype)
    return out, jnp.isfinite(x).all(), jnp.isfinite(out).all()


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    check_regular(file, WeightsError)
    try:
        with open(file, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        # The library takes minutes and gigabytes to list a million tensors.
        if LARGE < length < file.stat().st_size:
            raise WeightsError(f"{file}: a header of {length:,} bytes: expected at most {LARGE:,}")
        with safe_open(file, framework="numpy") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file}: not readable as safetensors (damaged or truncated?): {error}") from None


def _names(file: Path) -> set[str]:
    with _opened(file) as opened:
        return set(opened.keys())


def _read(file: Path, name: str, shape: tuple[int, ...], transpose: bool) -> np.ndarray:
    # Opened for each tensor: pages of an open file stay in memory beside the arrays.
    with _opened(file) as opened:
        _check_piece(file, name, opened.get_slice(name), shape, transpose)
        return opened.get_tensor(name)


def _read_parts(
    file: Path, name: str, shape: tuple[int, ...], transpose: bool, sharding: NamedSharding, dtype: str | None
) -> tuple[Array, np.ndarray]:
    """The parts of a tensor that this host's devices hold, each read by itself, and the tensor's `sample`."""
    parts: dict[tuple[tuple[int, int], ...], Array] = {}
    arrays = []
    with _opened(file) as opened:
        piece = opened.get_slice(name)
        _check_piece(file, name, piece, shape, transpose)

        def stored(index: tuple[slice, ...]) -> np.ndarray:
            return piece[index[::-1] if transpose else index]

        for device, index in sharding.addressable_devices_indices_map(shape).items():
            assert index is not None
            # Slices are no keys before Python 3.12.
            key = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
            if key not in parts:
                part = jax.device_put(stored(tuple(slice(*ends) for ends in key)), device)
                parts[key] = place(part, dtype, transpose, f"{file}: tensor {name}")
            arrays.append(jax.device_put(parts[key], device))
        elements = zip(*sampled(shape), strict=True)
        one_by_one = [stored(tuple(slice(int(i), int(i) + 1) for i in at)).reshape(()) for at in elements]
    made = jax.make_array_from_single_device_arrays(shape, sharding, arrays)
    return made, in_bfloat16(np.stack(one_by_one))


def _check_piece(file: Path, name: str, piece: Any, shape: tuple[int, ...], transpose: bool) -> None:
    if piece.get_dtype() not in _DTYPES:
        raise WeightsError(f"{file}: tensor {name}: expected dtype {', '.join(_DTYPES)}, found {piece.get_dtype()}")
    expected = list(shape[::-1] if transpose else shape)
    if list(piece.get_shape()) != expected:
        raise WeightsError(f"{file}: tensor {name}: expected shape {expected}, found {list(piece.get_shape())}")


def _inside(shard: str) -> bool:
    """Whether a name stays in its folder; by the name alone, because snapshots of the hub are links to elsewhere."""
    posix, windows = PurePosixPath(shard), PureWindowsPath(shard)
    outside = posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts
    return shard.endswith(".safetensors") and not outside


def _check_tied(places: dict[str, tuple[Path, str]]) -> None:
    """A head in the file of a tied model is not used, so it must be the embedding; compared in pieces."""
    (file, name), (other, head_name) = places[_EMBED], places[_HEAD]
    where = f"{other}: tensor {head_name}"
    with _opened(file) as a, _opened(other) as b:
        embed, head = a.get_slice(name), b.get_slice(head_name)
        rows, alike = (
            embed.get_shape()[0],
            (embed.get_shape(), embed.get_dtype()) == (head.get_shape(), head.get_dtype()),
        )
        pieces = [slice(i, min(i + 1024, rows)) for i in range(0, rows, 1024)]
        if not alike or any(not np.array_equal(embed[piece], head[piece]) for piece in pieces):
            raise WeightsError(
                f"{where} differs from {name}: expected the same values, because config.json has "
                "tie_word_embeddings = true"
            )
