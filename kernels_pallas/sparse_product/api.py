"""The entry point of the operation."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.implementation import IMPLEMENTATIONS, choose, mosaic_problem
from kernels_pallas.kept import Kept
from kernels_pallas.sparse_product.config import Config, Ring, config_for, ring_problem
from kernels_pallas.sparse_product.reference import sparse_product_reference


def sparse_product(
    kept: Kept,
    weights: Sequence[Array],
    scales: Sequence[Array | None] | None = None,
    config: Config | Ring | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "parts batch _"], ...]:
    """Multiply each layer's listed channels with its weight, reading no other row of it.

    Args:
        kept: the lists, one layer of them per weight; their chunks must be those of `config`.
        weights: `[in, out]` each, bf16, f16, f32 or int8.
        scales: float32 `[out]` of each int8 weight, None for the others.
        config: how a kernel is cut into programs, a `Ring` for Mosaic; None asks `config_for`.
        implementation: "triton", "mosaic", "xla" or None, on a GPU the one that `config` is for.
        interpret: interpret the kernel, on any device.

    Returns:
        For each layer partial sums in float32, to be added over the first axis by whoever reads them.

    Raises:
        ValueError: an implementation that cannot run here, or lists and weights that do not fit together.
    """
    scales = [None] * len(weights) if scales is None else scales
    if len(weights) != kept.counts.shape[0]:
        raise ValueError(f"expected one list of channels for each of {len(weights)} weights, found {kept.counts.shape}")
    for weight, scale in zip(weights, scales, strict=True):
        if weight.shape[0] > kept.chunks * kept.rows or (str(weight.dtype) == "int8") != (scale is not None):
            raise ValueError(
                f"weight {weight.dtype}{list(weight.shape)}: expected at most {kept.chunks * kept.rows} rows, "
                "and a scale exactly if it is int8"
            )
    if len({weight.dtype for weight in weights}) > 1:
        raise ValueError(f"expected weights of one dtype, found {', '.join(str(w.dtype) for w in weights)}")
    chosen, batch = choose(implementation, interpret, (*IMPLEMENTATIONS, "mosaic")), kept.values.shape[2]
    if chosen == "xla":
        return sparse_product_reference(kept, weights, scales)
    sizes, dtype = tuple(w.shape[1] for w in weights), weights[0].dtype
    if config is None:
        mosaic = implementation != "triton" and not interpret and mosaic_problem() is None
        mosaic = mosaic and kept.values.dtype == jnp.bfloat16
        config = config_for(weights[0].shape[0], sizes, batch, dtype, mosaic)
    if implementation is None and isinstance(config, Ring):
        chosen = choose("mosaic", offered=("mosaic",))
    if kept.rows != config.rows:
        raise ValueError(f"the lists have chunks of {kept.rows} channels; the configuration expects {config.rows}")
    if chosen == "triton" and isinstance(config, Config):
        from kernels_pallas.sparse_product.triton import sparse_product_triton

        return sparse_product_triton(kept, weights, scales, config, interpret)
    if chosen != "mosaic" or not isinstance(config, Ring):
        raise ValueError(f"implementation = {chosen!r} cannot run with {config}: Triton takes a Config, Mosaic a Ring")
    if (problem := ring_problem(config, sizes, batch, dtype, kept.values.dtype)) is not None:
        raise ValueError(f"implementation = 'mosaic': {problem}")
    from kernels_pallas.sparse_product.mosaic import sparse_product_mosaic

    return sparse_product_mosaic(kept, weights, scales, config)
