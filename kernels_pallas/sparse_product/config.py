"""How the product is cut into programs: tuned values per device where there are some, a heuristic elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from kernels_pallas.formats import FORMATS, Format
from kernels_pallas.kept import power_of_two
from kernels_pallas.tuned import tuned


@dataclasses.dataclass(frozen=True)
class Config:
    """A program multiplies `lists` chunks with `block_columns` columns, `block_rows` listed channels at a time."""

    rows: int  # channels in a chunk, a power of two
    lists: int  # chunks that a program walks side by side
    block_rows: int
    block_columns: int
    warps: int
    stages: int = 2


def splits(config: Config, size_in: int) -> int:
    """Into how many partial sums a product is split, of planes that of the first."""
    return -(-size_in // (config.rows * config.lists))


def plane_config(config: Config, form: Format, plane: int) -> Config:
    """How one plane of a format is cut: as many bytes of a row as of the first, and lists that are shorter together."""
    if plane == 0:
        return config
    forms = form.row_forms
    columns = config.block_columns * forms[plane].packed // forms[0].packed
    return dataclasses.replace(config, lists=min(4 * config.lists, config.block_rows), block_columns=columns)


def config_for(size_in: int, sizes_out: tuple[int, ...], batch: int, kind: str, device: str | None = None) -> Config:
    """The tuned configuration of the device for this shape, or the heuristic's.

    Args:
        size_in: input channels.
        sizes_out: columns of each layer of the launch.
        batch: sequences.
        kind: the weights' format by name.
        device: `jax.Device.device_kind`; None is the default device.
    """
    found = tuned(device, "triton").get(shape_key(size_in, sizes_out, batch, kind))
    return heuristic(size_in, sizes_out, batch, kind) if found is None else Config(**found)


def shape_key(size_in: int, sizes_out: tuple[int, ...], batch: int, kind: str) -> str:
    """How a shape is named in the files of tuned values."""
    return f"{size_in}x{'+'.join(map(str, sizes_out))} batch {batch} {kind}"


def heuristic(size_in: int, sizes_out: tuple[int, ...], batch: int, kind: str) -> Config:
    """Always answers: enough programs for any GPU, each with a few steps to walk."""
    wide = sum(sizes_out) >= 16_384
    rows = min(512 if wide or batch == 1 else 256, max(32, power_of_two(size_in) // 8))
    lists = max(1, min(8, power_of_two(-(-size_in // rows)) // 16))
    if batch > 1 or FORMATS[kind].group is not None:
        return Config(rows, lists, 32, 128, 4)
    return Config(rows, lists, 8, 256, 8) if wide else Config(rows, lists, 32, 128, 8)


def search_space(size_in: int, sizes_out: tuple[int, ...], batch: int, kind: str) -> Iterator[Config]:
    """The configurations that a tuner tries."""
    for rows in (128, 256, 512):
        for lists in (1, 2, 4, 8):
            for block_rows in (8, 16, 32, 64):
                for block_columns in (64, 128, 256, 512):
                    for warps in (2, 4, 8, 16):
                        config = Config(rows, lists, block_rows, block_columns, warps)
                        programs = splits(config, size_in) * sum(-(-n // block_columns) for n in sizes_out)
                        per_thread = block_rows * block_columns / (32 * warps)
                        if 8 <= per_thread <= 64 and 200 <= programs <= 2_500 and valid(config, batch, kind):
                            yield config


def valid(config: Config, batch: int, kind: str) -> bool:
    """What the kernel can run.

    Whole entries of every list in a block, a tensor core's 16 rows for a batch, and one scale a row if rows have some.
    """
    group = FORMATS[kind].group
    fits = config.lists <= config.block_rows <= config.rows * config.lists
    return fits and (batch == 1 or config.block_rows >= 16) and (group is None or config.block_columns <= group)
