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


SHARED_MEMORY = 227 * 1024  # bytes that one program may have on Hopper


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
        mosaic: take the Mosaic kernel where tuning found it to be the faster one.
        device: `jax.Device.device_kind`; None is the default device.
    """
    device = jax.devices()[0].device_kind if device is None else device
    key = shape_key(size_in, sizes_out, batch, jnp.dtype(dtype).itemsize)
    tuned = _tuned(device)
    if mosaic and jnp.dtype(dtype) == jnp.bfloat16 and key in tuned["mosaic"]:
        return Ring(**tuned["mosaic"][key])
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
        chunks = -(-size_in // rows)
        for lists in (1, 2, 4, 8):
            for block_rows in (8, 16, 32, 64):
                for block_columns in (64, 128, 256, 512):
                    programs = -(-chunks // lists) * sum(-(-n // block_columns) for n in sizes_out)
                    for warps in (2, 4, 8, 16):
                        config = Config(rows, lists, block_rows, block_columns, warps)
                        per_thread = block_rows * block_columns / (32 * warps)
                        if 8 <= per_thread <= 64 and 200 <= programs <= 2_500 and valid(config, batch):
                            yield config


def valid(config: Config, batch: int) -> bool:
    """What the kernel can run: whole entries of every list in a block, and a tensor core's 16 rows for a batch."""
    return config.lists <= config.block_rows <= config.rows * config.lists and (batch == 1 or config.block_rows >= 16)


def ring_space(size_in: int, sizes_out: tuple[int, ...]) -> Iterator[Ring]:
    """The configurations of the Mosaic kernel that a tuner tries."""
    for rows in (256, 512):
        chunks = -(-size_in // rows)
        for lists in (1, 2, 4):
            for block_columns in (256, 512, 1024):
                for group, slots in ((8, 6), (8, 8), (8, 12), (8, 24), (16, 6), (16, 8), (16, 12)):
                    ring = Ring(rows, lists, block_columns, group, slots)
                    programs = -(-chunks // lists) * sum(n // block_columns for n in sizes_out)
                    if 32 <= programs <= 600 and ring_problem(ring, sizes_out, 1, jnp.bfloat16) is None:
                        yield ring


def ring_problem(ring: Ring, sizes_out: Sequence[int], batch: int, dtype: DTypeLike) -> str | None:
    """Why the Mosaic kernel cannot run a product, if it cannot."""
    if batch != 1 or jnp.dtype(dtype) != jnp.bfloat16:
        return f"takes one sequence and bfloat16 weights, found {batch} and {jnp.dtype(dtype).name}"
    if any(n % ring.block_columns for n in sizes_out) or ring.block_columns % 256 or ring.block_columns > 1024:
        return f"block_columns = {ring.block_columns} must divide {list(sizes_out)}, and be 256, 512, or 1024"
    used = 8 * ring.rows * ring.lists + 16 * ring.slots + 2 * ring.slots * ring.group * ring.block_columns
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
