"""Weights of a Hugging Face folder: safetensors in, the plain parameter pytree out, a few tensors at a time."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool

from wisparse_jax.errors import WeightsError
from wisparse_jax.files import read_json, shown
from wisparse_jax.files.reading import LARGE
from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.fingerprint import digest, in_bfloat16, sample, sampled
from wisparse_jax.models.mesh import param_shardings
from wisparse_jax.models.other_checkpoints import of_other_kinds
from wisparse_jax.models.parameters import flat, hf_name, param_shapes
from wisparse_jax.models.tensor_files import Tensor, check_piece, check_tied, opened, read_tensor, tensor_names

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
READERS = 4  # threads
AHEAD = 512 << 20  # bytes, as float32, of tensors that are being read, and again of those that are being placed
T = TypeVar("T")

# Constants that old checkpoints carry; the configuration gives them.
IGNORED = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]  # tensor name -> file name


_EMBED, _HEAD = hf_name("embed"), hf_name("lm_head")


def read_weights(
    folder: Path, config: LlamaConfig, dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[dict[str, Any], str]:
    """Read the safetensors of a folder onto the default device, tensor by tensor, or straight into parts on a mesh.

    Files are read by several threads while the tensors before are transferred, cast and checked. Memory holds the model
    and of tensors on their way at most 2 `AHEAD` (1 GiB) and the largest one, or three where each is larger than that.
    Of a mesh's devices each gets its own part alone, one after the other, and no host reads more than its devices hold.

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
    values: dict[str, Array] = {}
    samples: dict[str, tuple[tuple[int, ...], np.ndarray]] = {}
    tensors = _tensors(folder, config, list(leaves))
    how = ((tensor, leaves[tensor.path].shape, transposed(tensor.path)) for tensor in tensors)
    if mesh is None:
        made = _place_all(how, dtype)
    else:
        made = ((t.path, *_read_parts(t, shape, turned, shardings[t.path], dtype)) for t, shape, turned in how)
    for path, value, sampled_values in made:
        values[path], samples[path] = value, (leaves[path].shape, sampled_values)
    return jax.tree.unflatten(jax.tree.structure(shapes), [values[path] for path in leaves]), digest(config, samples)


def _tensors(folder: Path, config: LlamaConfig, paths: list[str]) -> Iterator[Tensor]:
    """The tensors of a folder that the model is made of, each once; refuses the first that should not be there."""
    wanted = {hf_name(path): path for path in paths}
    seen: set[str] = set()
    heads: dict[str, Tensor] = {}  # a tied model's embedding and the copy of it that some files hold
    files = find_files(folder)
    for file, promised in files.items():
        names = tensor_names(file)
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
                heads[full] = Tensor(file, name, "embed")
            if config.tied_embeddings and full == _HEAD:
                continue
            if full not in wanted or full in seen:
                reason = "there is another of it" if full in wanted else of_other_kinds(name)
                reason = reason or "the model in config.json has none"
                raise WeightsError(f"{file}: tensor {name} is unexpected; {reason}")
            seen.add(full)
            yield Tensor(file, name, wanted[full])
    if absent := [name for name in wanted if name not in seen]:
        listed = ", ".join(file.name for file in files)
        raise WeightsError(f"{folder}: tensor {absent[0]} is missing ({len(absent)} in all); searched {listed}")
    if len(heads) == 2:
        check_tied(heads[_EMBED], heads[_HEAD])


def _place_all(
    tensors: Iterator[tuple[Tensor, tuple[int, ...], bool]], dtype: str | None
) -> Iterator[tuple[str, Array, np.ndarray]]:
    """Each tensor's path, value on the default device and `sample`; reads, transfers and checks overlap."""
    readers = ThreadPoolExecutor(READERS, "weights")

    def begin() -> Iterator[tuple[int, tuple[Tensor, bool, Future[np.ndarray]]]]:
        for tensor, shape, turned in tensors:
            yield 4 * math.prod(shape), (tensor, turned, readers.submit(read_tensor, tensor, shape, turned))

    def place_each() -> Iterator[tuple[int, tuple[Tensor, np.ndarray, _Placed]]]:
        for size, (tensor, turned, reading) in _ahead(begin()):
            stored = reading.result()
            del reading
            values = sample(stored.T if turned else stored)
            # By the thread of the caller, whose default device is its own.
            placed = _start(stored, dtype, turned)
            del stored
            yield size, (tensor, values, placed)

    try:
        for _, (tensor, values, placed) in _ahead(place_each()):
            yield tensor.path, _checked(placed, dtype, str(tensor)), values
    finally:
        # Without waiting: a slow disk would hold up an error or Ctrl-C.
        readers.shutdown(wait=False, cancel_futures=True)


def _ahead(items: Iterator[tuple[int, T]]) -> Iterator[tuple[int, T]]:
    """The items, each with its size, when later ones that are `AHEAD` in all have come, or one; then an error."""
    waiting: deque[tuple[int, T]] = deque()
    error: WeightsError | None = None
    try:
        for item in items:
            waiting.append(item)
            del item
            while len(waiting) > 1 and sum(size for size, _ in waiting) > AHEAD:
                yield waiting.popleft()
    except WeightsError as problem:
        error = problem
    while waiting:
        yield waiting.popleft()
    if error is not None:
        raise error


def transposed(path: str) -> bool:
    """Whether a parameter is stored `[out, in]`: every matrix but the embedding."""
    return path == "lm_head" or path.endswith(".kernel")


def find_files(folder: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a folder, each with the tensors that the index promises there (None: no index).

    Raises:
        WeightsError: no safetensors, or an index that is damaged or points outside the folder.
    """
    # Links that point nowhere are there, for the reader to say so.
    if os.path.lexists(folder / SINGLE):
        return {folder / SINGLE: None}
    index = folder / INDEX
    if not os.path.lexists(index):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"found only {', '.join(pickles)}: pickle files are never opened" if pickles else "found neither"
        raise WeightsError(f"{folder}: no weights: expected {SINGLE} or {INDEX}, {found}")
    promised: dict[str, set[str]] = {}
    for name, shard in _entries(index).items():
        if IGNORED.fullmatch(name):
            continue
        if not os.path.lexists(folder / shard):
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
    return _checked(_start(stored, dtype, transpose), dtype, where)


_Placed = tuple[Array, Bool[Array, ""], Bool[Array, ""]]  # the tensor, whether it was finite, whether it still is


def _start(stored: Any, dtype: str | None, transpose: bool) -> _Placed:
    return _finish(stored, dtype=np.dtype(jnp.dtype(dtype or stored.dtype)), transpose=transpose)


def _checked(placed: _Placed, dtype: str | None, where: str) -> Array:
    out, finite, fits = placed
    if not finite:
        raise WeightsError(f"{where} is not finite: expected numbers, found NaN or infinity")
    if not fits:
        raise WeightsError(f"{where} does not fit: found values beyond the range of {dtype}")
    return out


@functools.partial(jax.jit, static_argnames=("dtype", "transpose"))
def _finish(x: Array, dtype: Any, transpose: bool) -> _Placed:
    # Without the sign, bits are ordered as magnitudes, infinity and NaN above all. The maximum is an integer's because
    # that of floats passes NaN by on a CPU. All of `isfinite` takes six times as long there. Rounding keeps the order.
    integer = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    sign = integer.type(1 << (8 * x.dtype.itemsize - 1))
    largest = lax.bitcast_convert_type(jnp.max(lax.bitcast_convert_type(x, integer) & ~sign), x.dtype)
    return (x.T if transpose else x).astype(dtype), jnp.isfinite(largest), jnp.isfinite(largest.astype(dtype))


def _read_parts(
    tensor: Tensor, shape: tuple[int, ...], transpose: bool, sharding: NamedSharding, dtype: str | None
) -> tuple[Array, np.ndarray]:
    """The parts of a tensor that this host's devices hold, each read by itself, and the tensor's `sample`."""
    parts: dict[tuple[tuple[int, int], ...], Array] = {}
    arrays = []
    with opened(tensor.file) as (library, _, _):
        piece = library.get_slice(tensor.name)
        check_piece(tensor, piece, shape, transpose)

        def stored(index: tuple[slice, ...]) -> np.ndarray:
            return piece[index[::-1] if transpose else index]

        for device, index in sharding.addressable_devices_indices_map(shape).items():
            assert index is not None
            # Slices are no keys before Python 3.12.
            key = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
            if key not in parts:
                part = jax.device_put(stored(tuple(slice(*ends) for ends in key)), device)
                parts[key] = place(part, dtype, transpose, str(tensor))
            arrays.append(jax.device_put(parts[key], device))
        elements = zip(*sampled(shape), strict=True)
        one_by_one = [stored(tuple(slice(int(i), int(i) + 1) for i in at)).reshape(()) for at in elements]
    made = jax.make_array_from_single_device_arrays(shape, sharding, arrays)
    return made, in_bfloat16(np.stack(one_by_one))


def _inside(shard: str) -> bool:
    """Whether a name stays in its folder; by the name alone, because snapshots of the hub are links to elsewhere."""
    posix, windows = PurePosixPath(shard), PureWindowsPath(shard)
    outside = posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts
    return shard.endswith(".safetensors") and not outside
