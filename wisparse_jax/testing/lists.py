"""Lists of kept channels, written out."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from kernels_pallas.kept import Kept


def listed_channels(
    kept: Kept, size: int
) -> tuple[Bool[np.ndarray, "layers size"], Float[np.ndarray, "layers batch size"]]:
    """Which of `size` channels each layer lists, and each sequence's values of them, 0 for the others; float32.

    Raises:
        IndexError: a list names a channel that is not below `size`.
        ValueError: it names one twice.
    """
    counts, channels, values = (np.asarray(a) for a in kept)
    listed = np.zeros((len(counts), size), bool)
    dense = np.zeros((len(counts), values.shape[2], size), np.float32)
    for layer, chunk in np.ndindex(counts.shape):
        count = counts[layer, chunk]
        at = channels[layer, chunk, :count]
        if listed[layer, at].any() or len(set(at.tolist())) < count:
            raise ValueError(f"layer {layer}, chunk {chunk}: a channel is listed twice in {at}")
        listed[layer, at] = True
        dense[layer][:, at] = values[layer, chunk][:, :count]
    return listed, dense
