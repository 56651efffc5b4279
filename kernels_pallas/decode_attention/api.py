"""The entry point of the operation."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from kernels_pallas.decode_attention.reference import decode_attention_reference
from kernels_pallas.implementation import choose

# Programs that fill a GPU, and the fewest slots that are worth a program of their own.
PROGRAMS, SLOTS = 128, 32


class HeadNorms(NamedTuple):
    """Weights of the RMS norms of queries and keys over the head dimension (Qwen3)."""

    query: Float[Array, " head_dim"]
    key: Float[Array, " head_dim"]


def splits_for(batch: int, kv_heads: int, slots: int) -> int:
    """Into how many parts the slots of a sequence are split, each a program's work."""
    wanted = max(1, min(PROGRAMS // (batch * kv_heads), slots // SLOTS))
    return 1 << (wanted.bit_length() - 1)


def decode_attention(
    products: tuple[
        Float[Array, "parts batch query_features"],
        Float[Array, "parts batch kv_features"],
        Float[Array, "parts batch kv_features"],
    ],
    biases: tuple[Array | None, Array | None, Array | None],
    norms: HeadNorms | None,
    cos: Float[Array, "batch half"],
    sin: Float[Array, "batch half"],
    keys: Float[Array, "batch slots kv_heads head_dim"],
    values: Float[Array, "batch slots kv_heads head_dim"],
    slot: Int[Array, ""],
    start: Int[Array, " batch"],
    window: int | None,
    norm_eps: float = 1e-6,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[
    Float[Array, "batch splits query_features"],
    Float[Array, "batch splits heads"],
    Float[Array, "batch splits heads"],
    Float[Array, "batch slots kv_heads head_dim"],
    Float[Array, "batch slots kv_heads head_dim"],
]:
    """Finish q, k and v, write k and v into the cache, and attend to it, in splits of its slots.

    Args:
        products: partial sums of q, k and v in float32, added here.
        biases: of q, k and v.
        norms: of query and key heads, or None.
        cos: of the new token's rotary angles.
        sin: likewise.
        keys: the cache, of which slots start[b] .. slot - 1 are read and `slot` is written.
        values: likewise.
        slot: where the new token stands.
        start: the first slot of each sequence.
        window: tokens that a query sees, itself included, or None.
        norm_eps: of the norms.
        implementation: "triton", "xla" or None.
        interpret: interpret the kernel, on any device.

    Returns:
        Per split the unnormalised output, the highest score and the sum of weights of each head, in float32, to be
        merged by `select_attention`; then the new cache, in the memory of the old one where the caller donates it.

    Raises:
        ValueError: an implementation that cannot run here.
    """
    arguments = (products, biases, norms, cos, sin, keys, values, slot, start, window, norm_eps)
    if choose(implementation, interpret) == "xla":
        return decode_attention_reference(*arguments)
    from kernels_pallas.decode_attention.triton import decode_attention_triton

    return decode_attention_triton(*arguments, splits_for(len(start), keys.shape[2], keys.shape[1]), interpret)
