"""Several devices: a mesh with the axes `data` and `model`, and how parameters and batches lie on it.

The weights of heads, of the MLP's features and of the vocabulary are split over `model`, the rows of a batch over
`data`. A model's mesh is the one that its weights lie on, so that nothing else has to know of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from kernels_pallas.formats import FORMATS
from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.parameters import Params, axis_sizes, declared, flat

DATA, MODEL = "data", "model"
# Logical axes whose parts are independent of each other but for one sum over the model axis.
SPLIT = ("vocab", "heads", "kv_heads", "mlp")
_EXAMPLE = f"such as {DATA}=2,{MODEL}=4"


def make_mesh(
    mesh: str | Mapping[str, int] | Mesh, config: LlamaConfig | None = None, weights: str | None = None
) -> Mesh:
    """A mesh of all devices (of all hosts), neighbours along `model`.

    Args:
        mesh: text such as "data=2,model=4", sizes by axis, or a mesh of JAX's with these axes; an axis that is not
            named has size 1.
        config: of the model that is to lie on it.
        weights: the format that its block linears are rounded to, or None.

    Raises:
        WisparseError: an unknown axis, sizes that do not make up the devices, or a model that cannot be split so.
    """
    if isinstance(mesh, Mesh):
        _check_axes(mesh.shape)
        missing = [axis for axis in (DATA, MODEL) if axis not in mesh.shape]
        devices = mesh.devices.reshape(*mesh.devices.shape, *(1,) * len(missing))
        order = [*mesh.axis_names, *missing]
        devices = devices.transpose([order.index(axis) for axis in (DATA, MODEL)])
        made = Mesh(devices, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)
    else:
        sizes = _parsed(mesh) if isinstance(mesh, str) else dict(mesh)
        _check_axes(sizes)
        shape, count = (sizes.get(DATA, 1), sizes.get(MODEL, 1)), jax.device_count()
        if shape[0] * shape[1] != count:
            raise WisparseError(
                f"mesh = {DATA}={shape[0]},{MODEL}={shape[1]}: expected sizes whose product is the number of devices, "
                f"{count}, found {shape[0] * shape[1]}"
            )
        made = jax.make_mesh(shape, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)
    if config is not None:
        _check_model(config, made.shape[MODEL], weights)
    return made


def _parsed(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if not size.isdecimal():
            raise WisparseError(f"mesh = {text!r}: expected axes and sizes {_EXAMPLE}, found {part!r}")
        if name in sizes:
            raise WisparseError(f"mesh = {text!r}: axis {name!r} is given twice")
        sizes[name] = int(size)
    return sizes


def _check_axes(sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if name not in (DATA, MODEL):
            raise WisparseError(f"mesh: unknown axis {name!r}: expected {DATA} and {MODEL}, {_EXAMPLE}")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise WisparseError(f"mesh: {name} = {size!r}: expected a whole number, 1 or above")


def _check_model(config: LlamaConfig, size: int, weights: str | None) -> None:
    counts = {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
    }
    for field, count in counts.items():
        if count % size:
            raise WisparseError(f"mesh: {MODEL} = {size} does not divide {field} = {count} of the model")
    group = None if weights is None else FORMATS[weights].group
    if group is not None:
        for axis in ("heads", "kv_heads", "mlp"):
            if size > 1 and (features := axis_sizes(config)[axis]) % (group * size):
                raise WisparseError(
                    f"mesh: {MODEL} = {size} does not divide the groups of {group} {weights} columns that share a "
                    f"scale: {axis} has {features} features"
                )


def mesh_of(params: Params) -> Mesh | None:
    """The mesh that parameters lie on; None for one device, and inside a compiled function."""
    embed = params.get("embed")
    if not isinstance(embed, jax.Array) or isinstance(embed, Tracer):
        return None
    sharding = embed.sharding
    found = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return found if isinstance(found, Mesh) and found.axis_names == (DATA, MODEL) else None


def param_specs(config: LlamaConfig, params: Params, size: int) -> Params:
    """How each parameter, or its shape, is split over a model axis of some size; also of rounded weights."""

    def spec(path: str, leaf: Any) -> PartitionSpec:
        # A rounded weight has a scale, or several planes.
        named = re.sub(r"\.(scale|kernel\.\d+)$", ".kernel", path) if path.startswith("blocks.") else path.split(".")[0]
        axes = declared(named).axes
        if path.endswith(".scale"):  # of columns [out], of groups of them in a row [groups, in]
            axes = axes[::-1][: leaf.ndim]
        # A vocabulary that cannot be split is whole everywhere.
        whole = () if config.vocab_size % size == 0 else ("vocab",)
        return PartitionSpec(*(MODEL if axis in SPLIT and axis not in whole else None for axis in axes))

    leaves = [spec(path, leaf) for path, leaf in flat(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def param_shardings(config: LlamaConfig, params: Params, mesh: Mesh) -> Params:
    """The sharding of each parameter, or of its shape."""
    specs = param_specs(config, params, mesh.shape[MODEL])
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def part_of(config: LlamaConfig, size: int) -> LlamaConfig:
    """The sizes of one device's part of a model that is split over a model axis of some size."""
    heads, kv_heads, features = config.num_heads // size, config.num_kv_heads // size, config.intermediate_size // size
    return dataclasses.replace(config, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=features)


def place_on(mesh: Mesh | None, config: LlamaConfig, params: Params) -> Params:
    """The parameters spread over a mesh, if there is one; those that lie so already stay where they are."""
    return params if mesh is None else jax.device_put(params, param_shardings(config, params, mesh))


def spread(
    mesh: Mesh | None, rows: Shaped[np.ndarray, "rows ..."] | Shaped[Array, "rows ..."]
) -> Shaped[Array, "rows ..."]:
    """An array on the devices, its rows over `data` where that divides them, whole everywhere otherwise."""
    if mesh is None:
        return jnp.asarray(rows)
    spec = PartitionSpec(DATA) if len(rows) % mesh.shape[DATA] == 0 else PartitionSpec()
    return jax.device_put(rows, NamedSharding(mesh, spec))


def data_size(mesh: Mesh | None) -> int:
    """Into how many parts the rows of a batch are split."""
    return 1 if mesh is None else mesh.shape[DATA]


def on_host(array: Any) -> np.ndarray:
    """An array on the host, whole, also where other hosts hold parts of it: then all of them must ask for it."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
