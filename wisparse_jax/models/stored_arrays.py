"""The tensors of a converted checkpoint, read with Orbax a few hundred at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wisparse_jax.errors import WeightsError, first_line
from wisparse_jax.files import check_regular
from wisparse_jax.files.arrays import first_failure_alone, outside_event_loops
from wisparse_jax.models.weights import AHEAD


def restore(
    folder: Path, tensors: dict[str, jax.ShapeDtypeStruct], shardings: dict[str, Any] | None
) -> Iterator[tuple[str, np.ndarray | jax.Array]]:
    """The stored arrays of these shapes and dtypes, one by one; with shardings every device reads its own part.

    Raises:
        WeightsError: damaged or incomplete; names the tensor.
    """
    import orbax.checkpoint as ocp

    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder; the checkpoint is incomplete")
    for path in folder.rglob("*"):
        if not path.is_dir():
            check_regular(path, WeightsError)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:

        def read(paths: list[str]) -> dict[str, Any]:
            item = {path: tensors[path] for path in paths}
            how = {
                path: ocp.RestoreArgs(restore_type=np.ndarray)
                if shardings is None
                else ocp.ArrayRestoreArgs(sharding=shardings[path], global_shape=item[path].shape)
                for path in paths
            }
            args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
            found = outside_event_loops(lambda: reader.restore(folder.absolute(), args=args))
            kind = np.ndarray if shardings is None else jax.Array
            for path, leaf in item.items():
                array = found[path]
                if not isinstance(array, kind) or (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
                    raise ValueError("it holds something else")
            return found

        # Each call reads the metadata of all tensors.
        for paths in _batches(tensors):
            try:
                with first_failure_alone():
                    found = read(paths)
            except Exception:  # Orbax and TensorStore raise many kinds for damaged files, without the tensor's name
                found = {}
            for path in paths:
                try:
                    array = found.pop(path) if found else read([path])[path]
                except Exception as error:
                    problem = f"is not readable by Orbax (damaged or incomplete?): {first_line(error)}"
                    raise WeightsError(f"{folder}: tensor {path} {problem}") from None
                yield path, array


def _batches(tensors: dict[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    """Tensors in their order, as many at a time as `AHEAD` holds, at least one."""
    batch, size = [], 0
    for path, tensor in tensors.items():
        own = math.prod(tensor.shape) * tensor.dtype.itemsize
        if batch and size + own > AHEAD:
            yield batch
            batch, size = [], 0
        batch.append(path)
        size += own
    if batch:
        yield batch
