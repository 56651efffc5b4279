"""Integer weights widened once, where every token would widen them again: on a CPU, whose products take floats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.weight import Weight
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.formats import block_format, is_rounded
from wisparse_jax.models.mesh import mesh_of
from wisparse_jax.models.model import Model
from wisparse_jax.models.parameters import Params

SPARE = 0.25  # of the memory that is free, which stays so


def widen(params: Params) -> Params:
    """The parameters with what is stored as integers as the numbers that it stands for, in the activations' dtype."""
    dtype = params["embed"].dtype

    def wide(layer: Params) -> Params:
        weight = Weight.of(layer)
        if not weight.format.scaled:
            return layer
        return {name: value for name, value in layer.items() if name != "scale"} | {"kernel": weight.wide(dtype)}

    made = params | {"blocks": [block | {name: wide(block[name]) for name in LAYERS} for block in params["blocks"]]}
    if isinstance(params.get("lm_head"), dict):
        made["lm_head"] = wide(params["lm_head"])["kernel"]
    return made


def widened_where_faster(model: Model) -> tuple[Model, str | None]:
    """The model as it decodes fastest on the device that holds it, and a line about its integer weights if it has any.

    On a GPU they are read as they are. Planes of which a plan reads some stay as they are.
    """
    params = model.params
    if not is_rounded(params) or jax.default_backend() != "cpu" or mesh_of(params) is not None:
        return model, None
    slower = "integer weights are slower on a CPU, which widens them for every token"
    if model.rules is not None and len(block_format(params).planes) > 1:
        return model, f"{slower}: a plan for planes reads them as they are"
    needed = _bytes(jax.eval_shape(widen, params))
    room = _free_memory()
    if room is not None and needed > (1 - SPARE) * room:
        return model, f"{slower}: to widen them once takes {needed / 1e9:.1f} GB, and {room / 1e9:.1f} GB are free"
    made = model.with_weights(model.config, widen(params), model.basis_digest)
    made = made if model.rules is None else made.with_rules(model.rules, model.plan)
    return made, f"integer weights are widened to {jnp.dtype(params['embed'].dtype).name} once, as a CPU is faster so"


def _bytes(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _free_memory() -> int | None:
    """Bytes that may be taken without that others are pushed out; None where nothing says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")  # what a container may take
    try:
        most, taken = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such group, or "max"
        return free
    return min(free, most - taken)
