"""Decode attention as a Pallas kernel for the Triton backend.

Program (split, key head, sequence) adds the partial sums of its group's queries and its key and value, applies bias,
norm and rotation, and attends to its split of the slots with a running softmax. The first split also attends to the
new token, from registers, and writes it into the cache, so that no program reads what another writes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.kept import power_of_two

BLOCK, WARPS, SMALLEST_DOT = 64, 4, 16
NOTHING = -1e30  # a score that no slot has


def _kernel(
    *refs: Any,
    group: int,
    parts: int,
    biased: tuple[bool, ...],
    eps: float | None,
    window: int | None,
):
    products, rest = refs[:3], list(refs[3:])
    biases = [rest.pop(0) if present else None for present in biased]
    gains = None if eps is None else (rest.pop(0), rest.pop(0))
    cos_ref, sin_ref, place_ref, start_ref, _, _, out, highest, total, keys, values = rest
    split, head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    splits, dim, dtype = out.shape[1], keys.shape[3], keys.dtype
    half, padded = dim // 2, max(SMALLEST_DOT, power_of_two(group))
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dot = functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)
    h = jnp.arange(power_of_two(half))
    in_half = h < half
    member = jnp.arange(padded)
    cos = plt.load(cos_ref.at[row, h], mask=in_half, other=0.0)
    sin = plt.load(sin_ref.at[row, h], mask=in_half, other=0.0)

    def finished(which: int, at: Any, mask: Any) -> Any:
        """Some features of q, k or v: partial sums and bias."""
        loads = [plt.load(products[which].at[s, row, at], mask=mask, other=0.0) for s in range(parts)]
        y, bias = functools.reduce(jnp.add, loads).astype(dtype), biases[which]
        return y if bias is None else y + plt.load(bias.at[at], mask=mask, other=0)

    def halves(which: int, first: Any, mask: Any) -> tuple[Any, Any]:
        """The two halves of heads that begin at features `first`, normed and rotated."""
        wide = functools.partial(lax.broadcast_to_rank, rank=mask.ndim)
        a, b = finished(which, first + wide(h), mask), finished(which, first + half + wide(h), mask)
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        if gains is not None:
            square = jnp.sum(a * a, axis=-1) + jnp.sum(b * b, axis=-1)
            scale = lax.rsqrt(square / dim + eps)
            scale = scale[:, None] if a.ndim == 2 else scale
            g1 = plt.load(gains[which].at[h], mask=in_half, other=0)
            g2 = plt.load(gains[which].at[half + h], mask=in_half, other=0)
            a = (wide(g1) * (a * scale).astype(dtype)).astype(jnp.float32)
            b = (wide(g2) * (b * scale).astype(dtype)).astype(jnp.float32)
        c, s = wide(cos), wide(sin)
        return (a * c - b * s).astype(dtype), (b * c + a * s).astype(dtype)

    slot, scale = place_ref[0], dim**-0.5
    begin = plt.load(start_ref.at[row])
    if window is not None:
        begin = jnp.maximum(begin, slot - window + 1)
    begin = jnp.minimum(begin, slot)
    blocks = pl.cdiv(slot - begin, BLOCK)
    each = pl.cdiv(blocks, splits)
    low, high = split * each, jnp.minimum((split + 1) * each, blocks)
    d = jnp.arange(power_of_two(dim))
    in_dim = d < dim

    def fetch(i: Any) -> tuple[Any, Any, Any]:
        """Keys, in halves, and values of one block of slots."""
        at = begin + i * BLOCK + jnp.arange(BLOCK)
        seen = (at < slot) & (i < high)
        real_key, real_value = seen[:, None] & in_half[None, :], seen[:, None] & in_dim[None, :]
        one = plt.load(keys.at[row, at[:, None], head, h[None, :]], mask=real_key, other=0)
        two = plt.load(keys.at[row, at[:, None], head, half + h[None, :]], mask=real_key, other=0)
        return one, two, plt.load(values.at[row, at[:, None], head, d[None, :]], mask=real_value, other=0)

    ahead = fetch(low)  # in flight while the queries are made

    first = (head * group + member)[:, None] * dim
    real = (member < group)[:, None] & in_half[None, :]
    q1, q2 = halves(0, first, real)
    k1, k2 = halves(1, head * dim, in_half)
    v = finished(2, head * dim + d, in_dim)

    def in_parts(weights: Any) -> list[Any]:
        """Two numbers of a narrow dtype, as one alone would cost more than the rounding of the result.

        The second is above zero where the weight is, or an infinite value would become none at all.
        """
        if dtype == jnp.float32:
            return [weights]
        upper = (weights * (1 - 2.0**-8)).astype(dtype)
        return [upper, (weights - upper.astype(jnp.float32)).astype(dtype)]

    def attend(i: Any, carry: Any) -> Any:
        top, weight, acc, (one, two, value) = carry
        ahead = fetch(i + 1)
        seen = begin + i * BLOCK + jnp.arange(BLOCK) < slot
        scores = (dot(q1, one.T) + dot(q2, two.T)) * scale
        scores = jnp.where(seen[None, :], scores, NOTHING)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        p = jnp.exp(scores - new_top[:, None])
        shrink = jnp.exp(top - new_top)
        acc = acc * shrink[:, None] + sum(dot(part, value) for part in in_parts(p))
        return new_top, weight * shrink + jnp.sum(p, axis=1), acc, ahead

    own = (jnp.sum(q1.astype(jnp.float32) * k1.astype(jnp.float32)[None, :], axis=1)
           + jnp.sum(q2.astype(jnp.float32) * k2.astype(jnp.float32)[None, :], axis=1)) * scale  # fmt: skip
    holds = split == 0
    acc = jnp.where(holds, jnp.broadcast_to(v.astype(jnp.float32)[None, :], (padded, len(d))), 0.0)
    carry = (jnp.where(holds, own, NOTHING), jnp.where(holds, jnp.ones(padded, jnp.float32), 0.0), acc, ahead)
    top, weight, acc, _ = lax.fori_loop(low, high, attend, carry)

    lane = head * group + member
    plt.store(highest.at[row, split, lane], top, mask=member < group)
    plt.store(total.at[row, split, lane], weight, mask=member < group)
    plt.store(out.at[row, split, first + d[None, :]], acc, mask=(member < group)[:, None] & in_dim[None, :])

    @pl.when(holds)
    def _():
        plt.store(keys.at[row, slot, head, h], k1, mask=in_half)
        plt.store(keys.at[row, slot, head, half + h], k2, mask=in_half)
        plt.store(values.at[row, slot, head, d], v, mask=in_dim)


@functools.partial(jax.jit, static_argnames=("window", "norm_eps", "splits", "interpret"))
def decode_attention_triton(
    products: Any,
    biases: Any,
    norms: Any,
    cos: jax.Array,
    sin: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    slot: jax.Array,
    start: jax.Array,
    window: int | None,
    norm_eps: float,
    splits: int,
    interpret: bool,
) -> Any:
    """See `decode_attention`."""
    batch, _, kv_heads, _ = keys.shape
    features = products[0].shape[2]
    heads = features // keys.shape[3]
    kernel = functools.partial(
        _kernel,
        group=heads // kv_heads,
        parts=len(products[0]),
        biased=tuple(b is not None for b in biases),
        eps=None if norms is None else norm_eps,
        window=window,
    )
    gains = () if norms is None else (norms.query, norms.key)
    place = jnp.asarray(slot, jnp.int32).reshape(1)
    inputs = (*products, *(b for b in biases if b is not None), *gains, cos, sin, place, start, keys, values)
    return tuple(
        pl.pallas_call(
            kernel,
            grid=(splits, kv_heads, batch),
            out_shape=[
                jax.ShapeDtypeStruct((batch, splits, features), jnp.float32),
                jax.ShapeDtypeStruct((batch, splits, heads), jnp.float32),
                jax.ShapeDtypeStruct((batch, splits, heads), jnp.float32),
                jax.ShapeDtypeStruct(keys.shape, keys.dtype),
                jax.ShapeDtypeStruct(values.shape, values.dtype),
            ],
            input_output_aliases={len(inputs) - 2: 3, len(inputs) - 1: 4},
            compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=2),
            interpret=interpret,
            name="decode_attention",
        )(*inputs)
    )
