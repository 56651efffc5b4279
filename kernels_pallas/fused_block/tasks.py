"""What each CTA does in each phase."""

from __future__ import annotations

import numpy as np

from kernels_pallas.fused_block.memory_layout import memory_layout
from kernels_pallas.fused_block.tiling import (
    COUNTED,
    ENTERED,
    ENTRIES,
    FIRST_LAYER,
    LOAD,
    PHASES,
    QUAD,
    SET,
    FusedConfig,
    FusedShape,
    Task,
    most_splits,
    products,
)


def tasks(shape: FusedShape, config: FusedConfig) -> np.ndarray:
    """Every CTA's tasks, the same in all decoder blocks: int32 `[ctas, phases, fields]`."""
    found, exchange, grouped = [], memory_layout(shape, config).exchange, shape.format.group is not None
    later = shape.format.planes[-1]
    parts = {  # the partial sums, the input and the sums of squares
        "attn_in": ("qkv", "stream", "stream squares"),
        "attn_out": ("out", "attended", "stream squares"),
        "mlp_in": ("gated", "middle", "middle squares"),
        "mlp_mid": ("down", "gated", "stream squares"),
    }
    for cta in range(config.ctas):
        for group, p in products(shape, config).items():
            split, tile = divmod(cta, sum(p.tiles))
            layer = 0
            while tile >= p.tiles[layer]:
                tile -= p.tiles[layer]
                layer += 1
            size, vectors = p.sizes_out[layer], p.sizes_out[layer] // p.each
            units = -(-vectors // p.unit)
            low, high = (min(vectors, units * (tile + k) // p.tiles[layer] * p.unit) for k in (0, 1))
            width = -(-(high - low) // SET) * SET
            start = split * p.channels
            out, source, squares = (exchange[name] for name in parts[group])
            layers = 2 if group == "mlp_in" else 1
            rows = config.threads // QUAD // layers // width
            step = rows * ENTRIES
            found.append(
                Task(
                    working=int(split < p.splits),
                    first_channel=start,
                    channels=min(p.channels, p.size_in - start),
                    lists=layers,
                    width=width,
                    rows=rows,
                    columns=(high - low) * p.each,
                    first_column=low * p.each,
                    start=low * LOAD,
                    stride=size * shape.bits // 8,
                    entry=ENTERED.index(FIRST_LAYER[group]) + layer,
                    note=(COUNTED[group] + layer) * shape.planes * most_splits(shape, config) + split,
                    notes=int(tile == 0),
                    out=out + split * sum(p.sizes_out) + sum(p.sizes_out[:layer]),
                    source=source,
                    squares=squares,
                    normed=int(group in ("attn_in", "mlp_in")),
                    thresholds=4 * layer * p.size_in * shape.planes,
                    second_thresholds=4 * p.size_in * shape.planes if group == "mlp_in" else 0,
                    behind=int(group == "attn_in"),
                    phase=PHASES.index(group),
                    step=step,
                    narrow=-(-(2**16) // width),
                    share=-(-(2**32) // step),
                    other=p.channels * layers,
                    scales=low // SET * p.size_in * 2 if grouped else 0,
                    next_scales=p.size_in * 2 if grouped and width > SET else 0,
                    row_columns=width * p.each,
                    next_plane=4 * p.size_in,
                    later_start=low * LOAD * later // shape.bits,
                    later_stride=size * later // 8,
                    plane_note=most_splits(shape, config),
                )
            )
    return np.array(found, np.int32).reshape(config.ctas, len(PHASES), len(Task._fields))
