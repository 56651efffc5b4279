"""The step of one token: which implementation runs it, and its logits.

It is `token_logits`, dense or by rules, or for a sparse model the kernels' step, which takes the same
arguments and gives the same logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from kernels_pallas.implementation import choose as choose_kernels
from kernels_pallas.implementation import mosaic_problem
from kernels_pallas.kept import LARGEST_BATCH
from kernels_pallas.tuned import largest_batch
from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.decode import GroupThresholds, fused_step_problem, kernel_token_logits
from wisparse_jax.models.forward import Cache, Params, token_logits
from wisparse_jax.models.mesh import data_size, mesh_of
from wisparse_jax.models.mesh_decode import mesh_token_logits
from wisparse_jax.models.rules import Rules, mean_skipped, scaled_rules

# The newest tokens, their slot, where rows start and the cache in; logits and the cache with the tokens out.
NextLogits = Callable[
    [Int[Array, " batch"], Int[Array, ""], Int[Array, " batch"], Cache], tuple[Float[Array, "batch vocab"], Cache]
]
# The same with a factor of each row's thresholds at the end of what goes in, and with the share that each row skipped
# at the end of what comes out.
ControlledLogits = Callable[..., tuple[Float[Array, "batch vocab"], Cache, Float[Array, " batch"]]]


def decode_implementation(
    config: LlamaConfig,
    params: Params | None,
    rules: Rules | None,
    batch: int,
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> str:
    """What `decode` runs.

    "mosaic": the kernels, several decoder blocks in one launch of a Mosaic kernel, also for a dense model; "triton":
    the sparse kernels as launches of their own, by Triton; "xla": dense or masked-dense products.

    Args:
        config: of the model.
        params: its weights; None before they are read: whether the Mosaic kernel can run them is left open then.
        rules: of a sparse model, None for a dense one.
        batch: sequences.
        implementation: a choice by name; None takes the kernels on an NVIDIA GPU for as many sequences as they were
            measured to be faster for (`largest_batch`), the Mosaic kernel if it can run the model. On a mesh it never
            can, and sequences are those of a device.
        mesh: that the weights will lie on, before there are any.

    Raises:
        WisparseError: the named one cannot run: the reason is in the message.
    """
    mesh = mesh_of(params) if mesh is None and params is not None else mesh
    if mesh is not None and implementation == "mosaic":
        raise WisparseError(
            "implementation = 'mosaic' runs whole blocks in one launch, which a mesh cannot split: expected triton "
            "or xla"
        )
    batch = -(-batch // data_size(mesh))
    try:
        chosen = choose_kernels(implementation, offered=("triton", "mosaic", "xla"))
    except ValueError as error:
        raise WisparseError(str(error)) from None
    if implementation in ("triton", "mosaic"):
        if rules is None and implementation == "triton":
            raise WisparseError("implementation = 'triton' runs sparse models only; this one is dense")
        if batch > LARGEST_BATCH:
            raise WisparseError(
                f"implementation = {implementation!r} takes at most {LARGEST_BATCH} sequences, found {batch}"
            )
        known = params if implementation == "mosaic" else None
        problem = None if known is None else fused_step_problem(config, known, batch)
        if problem is not None:
            raise WisparseError(f"implementation = 'mosaic' {problem}")
        return chosen
    if chosen == "xla":
        return "xla"
    fused = mesh is None and batch <= largest_batch("mosaic") and mosaic_problem() is None
    if fused and (params is None or fused_step_problem(config, params, batch) is None):
        return "mosaic"
    return "triton" if rules is not None and batch <= largest_batch("triton") else "xla"


def masked_step(config: LlamaConfig, params: Params, rules: Rules) -> ControlledLogits:
    """The step of `token_loop` by masked-dense products."""

    def step(tokens: Array, slot: Array, start: Array, cache: Cache, factors: Array) -> tuple[Array, Cache, Array]:
        shares: list[Array] = []
        own = scaled_rules(rules, factors)
        logits, cache = token_logits(config, params, tokens, slot, start, cache, own, shares)
        return logits, cache, mean_skipped(config, shares[0])

    return step


def kernel_step(
    config: LlamaConfig,
    params: Params,
    thresholds: list[GroupThresholds],
    mesh: Mesh | AbstractMesh | None = None,
    **how: Any,
) -> ControlledLogits:
    """The step of `token_loop` by the kernels; `how` as `kernel_token_logits` takes it."""
    kernels = kernel_token_logits if mesh is None else functools.partial(mesh_token_logits, mesh=mesh)

    def step(tokens: Array, slot: Array, start: Array, cache: Cache, factors: Array) -> tuple[Array, Cache, Array]:
        skipped: list[Array] = []
        given = {"thresholds": thresholds, "factors": factors, "skipped": skipped}
        out = kernels(config, params, tokens, slot, start, cache, **given, **how)
        return *out, skipped[0]

    return step
