"""The entry point of the operation."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float

from kernels_pallas.implementation import choose
from kernels_pallas.kept import Kept
from kernels_pallas.sparse_product.config import Config, config_for
from kernels_pallas.sparse_product.reference import sparse_product_reference
from kernels_pallas.weight import Weight, as_weight


def sparse_product(
    kept: Kept,
    weights: Sequence[Weight | Array],
    config: Config | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "parts batch _"], ...]:
    """Multiply each layer's listed channels with its weight, reading no other row of it.

    Args:
        kept: the lists, one layer of them per weight, and of a weight of planes one per plane; their chunks must be
            those of `config`.
        weights: `[in, out]` each, all in one format.
        config: how the kernel is cut into programs; None asks `config_for`.
        implementation: "triton", "xla" or None.
        interpret: interpret the kernel, on any device.

    Returns:
        For each layer partial sums in float32, to be added over the first axis by whoever reads them.

    Raises:
        ValueError: an implementation that cannot run here, or lists and weights that do not fit together.
    """
    weights = [as_weight(weight) for weight in weights]
    lists = sum(len(weight.format.planes) for weight in weights)
    if lists != kept.counts.shape[0]:
        of = f"{len(weights)} weights" if lists == len(weights) else f"{lists} planes of {len(weights)} weights"
        raise ValueError(f"expected one list of channels for each of {of}, found {kept.counts.shape}")
    for weight in weights:
        if weight.shape[0] > kept.chunks * kept.rows or weight.format.scaled != (weight.scales is not None):
            raise ValueError(
                f"weight {weight.kind}{list(weight.shape)}: expected at most {kept.chunks * kept.rows} rows, "
                "and scales exactly if its format has some"
            )
    if len({weight.kind for weight in weights}) > 1:
        raise ValueError(f"expected weights in one format, found {', '.join(w.kind for w in weights)}")
    if choose(implementation, interpret) == "xla":
        return sparse_product_reference(kept, weights)
    kind, sizes = weights[0].kind, tuple(w.shape[1] for w in weights)
    if config is None:
        config = config_for(weights[0].shape[0], sizes, kept.values.shape[2], kind)
    if kept.rows != config.rows:
        raise ValueError(f"the lists have chunks of {kept.rows} channels; the configuration expects {config.rows}")
    from kernels_pallas.sparse_product.triton import sparse_product_triton

    return sparse_product_triton(kept, weights, config, interpret)
