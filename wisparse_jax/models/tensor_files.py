"""Tensors in safetensors files: the library checks a file and its header, the bytes are read past it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from wisparse_jax.errors import WeightsError
from wisparse_jax.files import check_regular
from wisparse_jax.files.reading import LARGE
from wisparse_jax.models.other_checkpoints import UNROUNDED

_DTYPES = {"BF16": jnp.bfloat16, "F16": np.float16, "F32": np.float32}


@dataclasses.dataclass(frozen=True)
class Tensor:
    file: Path
    name: str  # in the file
    path: str  # of the parameter

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name}"


@contextlib.contextmanager
def opened(file: Path) -> Iterator[tuple[Any, BufferedReader, int]]:
    """A file as the library opens it, its bytes, and how many of them are its header."""
    from safetensors import SafetensorError, safe_open

    check_regular(file, WeightsError)
    try:
        with open(file, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            # The library takes minutes and gigabytes to list a million tensors.
            if LARGE < length < file.stat().st_size:
                raise WeightsError(f"{file}: a header of {length:,} bytes: expected at most {LARGE:,}")
            with safe_open(file, framework="numpy") as library:
                yield library, raw, length
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file}: not readable as safetensors (damaged or truncated?): {error}") from None


def tensor_names(file: Path) -> set[str]:
    with opened(file) as (library, _, _):
        return set(library.keys())


def read_tensor(tensor: Tensor, shape: tuple[int, ...], transpose: bool) -> np.ndarray:
    with opened(tensor.file) as (library, raw, length):
        piece = library.get_slice(tensor.name)
        check_piece(tensor, piece, shape, transpose)
        # Not by the library, which has checked the header: it copies one tensor at a time and stops other threads.
        stored = np.empty(piece.get_shape(), _DTYPES[piece.get_dtype()])
        raw.seek(8 + length + _begin(raw.read(length), tensor.name, piece))
        if raw.readinto(stored.reshape(-1).view(np.uint8).data) < stored.nbytes:
            raise OSError(f"it ends within tensor {tensor.name}")
        return stored


def _begin(header: bytes, name: str, piece: Any) -> int:
    """Where a tensor begins behind the header. The library has opened the file again, which may be another by then."""
    try:
        entry = json.loads(header)[name]
        if (entry["dtype"], entry["shape"]) == (piece.get_dtype(), list(piece.get_shape())):
            return entry["data_offsets"][0]
    except (LookupError, TypeError, ValueError):
        pass
    raise OSError(f"its header describes tensor {name} otherwise than the library read it; was it replaced meanwhile?")


def check_piece(tensor: Tensor, piece: Any, shape: tuple[int, ...], transpose: bool) -> None:
    if piece.get_dtype() not in _DTYPES:
        advice = f": quantised weights are not supported; {UNROUNDED}" if piece.get_dtype() != "F64" else ""
        raise WeightsError(f"{tensor}: expected dtype {', '.join(_DTYPES)}, found {piece.get_dtype()}{advice}")
    expected = list(shape[::-1] if transpose else shape)
    if list(piece.get_shape()) != expected:
        raise WeightsError(f"{tensor}: expected shape {expected}, found {list(piece.get_shape())}")


def check_tied(first: Tensor, second: Tensor) -> None:
    """A head in the file of a tied model is not used, so it must be the embedding; compared in pieces."""
    with opened(first.file) as (a, _, _), opened(second.file) as (b, _, _):
        embed, head = a.get_slice(first.name), b.get_slice(second.name)
        rows, alike = (
            embed.get_shape()[0],
            (embed.get_shape(), embed.get_dtype()) == (head.get_shape(), head.get_dtype()),
        )
        pieces = [slice(i, min(i + 1024, rows)) for i in range(0, rows, 1024)]
        if not alike or any(not np.array_equal(embed[piece], head[piece]) for piece in pieces):
            raise WeightsError(
                f"{second} differs from {first.name}: expected the same values, because config.json has "
                "tie_word_embeddings = true"
            )
