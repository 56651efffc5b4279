"""How the product is cut into programs: tuned values per device where there are some, a heuristic elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.kept import power_of_two


@dataclasses.dataclass(frozen=True)
class Config:
    """A program multiplies `lists` chunks with `block_columns` columns, `block_rows` listed channels at a time."""

    rows: int  # channels in a chunk, a power of two
    lists: int  # chunks that a program walks side by side
    block_rows: int
    block_columns: int
    warps: int
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class Ring:
    """The Mosaic kernel's: a program multiplies `lists` chunks, with `slots` groups of `group` rows on their way."""

    rows: int
    lists: int
    block_columns: int
    group: int
    slots: int


def splits(config: Config | Ring, size_in: int) -> int:
    """Into how many partial sums a product is split."""
    return -(-size_in // (config.rows * config.lists))


SHARED_MEMORY = 227 * 1024  # bytes that one program may have on Hopper
PROCESSORS = 132  # of a Hopper GPU
FEW_WEIGHTS = 2**25
RING_COLUMNS = {"bfloat16": (256, 512, 1024), "int8": (512, 1024, 2048)}  # what a Mosaic program may multiply with


def config_for(
    size_in: int,
    sizes_out: tuple[int, ...],
    batch: int,
    dtype: DTypeLike,
    mosaic: bool = False,
    device: str | None = None,
) -> Config | Ring:
    """The tuned configuration of the device for this shape, or the heuristic's.

    Args:
        size_in: input channels.
        sizes_out: columns of each layer of the launch.
        batch: sequences.
        dtype: of the weights.
        mosaic: take the Mosaic kernel where tuning found it to be the faster one; for activations in bfloat16.
        device: `jax.Device.device_kind`; None is the default device.
    """
    device = jax.devices()[0].device_kind if device is None else device
    key = shape_key(size_in, sizes_out, batch, jnp.dtype(dtype).itemsize)
    tuned = _tuned(device)
    if mosaic and batch == 1 and jnp.dtype(dtype).name in RING_COLUMNS:
        if key in tuned["mosaic"]:
            return Ring(**tuned["mosaic"][key])
        ring = heuristic_ring(size_in, sizes_out, dtype)
        if key not in tuned["triton"] and ring is not None:
            return ring
    found = tuned["triton"].get(key)
    return heuristic(size_in, sizes_out, batch, jnp.dtype(dtype).itemsize) if found is None else Config(**found)


def shape_key(size_in: int, sizes_out: tuple[int, ...], batch: int, weight_bytes: int) -> str:
    """How a shape is named in the files of tuned values."""
    return f"{size_in}x{'+'.join(map(str, sizes_out))} batch {batch} bytes {weight_bytes}"


def heuristic(size_in: int, sizes_out: tuple[int, ...], batch: int, weight_bytes: int) -> Config:
    """Always answers: enough programs for any GPU, each with a few steps to walk."""
    wide = sum(sizes_out) >= 16_384
    rows = min(512 if wide or batch == 1 else 256, max(32, power_of_two(size_in) // 8))
    lists = max(1, min(8, power_of_two(-(-size_in // rows)) // 16))
    if batch > 1:
        return Config(rows, lists, 32, 128, 4)
    return Config(rows, lists, 8, 256, 8) if wide else Config(rows, lists, 32, 128, 8)


def search_space(size_in: int, sizes_out: tuple[int, ...], batch: int) -> Iterator[Config]:
    """The configurations that a tuner tries."""
    for rows in (128, 256, 512):
        for lists in (1, 2, 4, 8):
            for block_rows in (8, 16, 32, 64):
                for block_columns in (64, 128, 256, 512):
                    for warps in (2, 4, 8, 16):
                        config = Config(rows, lists, block_rows, block_columns, warps)
                        programs = splits(config, size_in) * sum(-(-n // block_columns) for n in sizes_out)
                        per_thread = block_rows * block_columns / (32 * warps)
                        if 8 <= per_thread <= 64 and 200 <= programs <= 2_500 and valid(config, batch):
                            yield config


def valid(config: Config, batch: int) -> bool:
    """What the kernel can run: whole entries of every list in a block, and a tensor core's 16 rows for a batch."""
    return config.lists <= config.block_rows <= config.rows * config.lists and (batch == 1 or config.block_rows >= 16)


def heuristic_ring(size_in: int, sizes_out: tuple[int, ...], dtype: DTypeLike) -> Ring | None:
    """About as many programs as a GPU has processors, with 96 KB on their way in each.

    None if no ring can run the product, or the Triton kernel is as fast: where 2-byte weights are few.
    """
    width = jnp.dtype(dtype).itemsize
    if width == 2 and size_in * sum(sizes_out) < FEW_WEIGHTS:
        return None

    def distance(ring: Ring) -> tuple[bool, int]:
        return splits(ring, size_in) > 16, abs(_programs(ring, size_in, sizes_out) - PROCESSORS)

    rings = ring_space(size_in, sizes_out, dtype)
    fitting = [r for r in rings if r.rows == 512 and r.slots * r.group * r.block_columns * width == 96 * 1024]
    return min(fitting, key=distance, default=None)


def ring_space(size_in: int, sizes_out: tuple[int, ...], dtype: DTypeLike) -> Iterator[Ring]:
    """The configurations of the Mosaic kernel that a tuner tries."""
    for rows in (256, 512):
        for lists in (1, 2, 4):
            for block_columns in RING_COLUMNS[jnp.dtype(dtype).name]:
                for group, slots in ((8, 6), (8, 8), (8, 12), (8, 24), (16, 6), (16, 8), (16, 12)):
                    ring = Ring(rows, lists, block_columns, group, slots)
                    few = 32 <= _programs(ring, size_in, sizes_out) <= 600
                    if few and ring_problem(ring, sizes_out, 1, dtype) is None:
                        yield ring


def _programs(ring: Ring, size_in: int, sizes_out: tuple[int, ...]) -> int:
    return splits(ring, size_in) * sum(n // ring.block_columns for n in sizes_out)


def ring_problem(
    ring: Ring, sizes_out: Sequence[int], batch: int, dtype: DTypeLike, values: DTypeLike = jnp.bfloat16
) -> str | None:
    """Why the Mosaic kernel cannot run a product of such weights and listed values, if it cannot."""
    name = jnp.dtype(dtype).name
    if jnp.dtype(values) != jnp.bfloat16:
        return f"takes activations in bfloat16, found {jnp.dtype(values).name}"
    if batch != 1 or name not in RING_COLUMNS:
        return f"takes one sequence and bfloat16 or int8 weights, found {batch} and {name}"
    if any(n % ring.block_columns for n in sizes_out) or ring.block_columns not in RING_COLUMNS[name]:
        columns = " or ".join(map(str, RING_COLUMNS[name]))
        return f"block_columns = {ring.block_columns}: expected {columns} for {name}, a divisor of {list(sizes_out)}"
    row = ring.block_columns * jnp.dtype(dtype).itemsize
    used = 8 * ring.rows * ring.lists + 16 * ring.slots + ring.slots * ring.group * row
    # With fewer slots than copying warps, one of them could come two rounds of a slot ahead of another.
    if used > SHARED_MEMORY or ring.group > 32 or not 4 <= ring.slots <= 128:
        return f"{ring}: expected at most {SHARED_MEMORY} bytes of shared memory, 32 rows a group, and 4 to 128 slots"
    return None


@functools.cache
def _tuned(device: str) -> dict[str, dict[str, Any]]:
    file = resources.files("kernels_pallas") / "tuned" / tuned_file(device)
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {kernel: found.get(kernel, {}) for kernel in ("triton", "mosaic")}


def tuned_file(device: str) -> str:
    """The name of a device's file of tuned values."""
    return device.lower().replace(" ", "-") + ".json"
