"""Selection as Pallas kernels for the Triton backend: one program per chunk, which computes its channels' values,
compares them with each layer's thresholds and writes each layer's list. No global scan: a chunk has its own count.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.formats.base import scaled
from kernels_pallas.kept import WHOLE, Kept, Nested, power_of_two

WARPS = 8
PARTS_WARPS = 32  # of a program that reads all partial sums of the stream


def _write(
    values: Sequence[Any], chunk: Any, size: int, rows: int, thresholds: Any, rest: Sequence[Any], nested: Nested
):
    """Write every layer's list of one chunk: the kept channels in order, then the skipped ones with value 0.

    `rest` is the factors of the sequences' thresholds, where there are some, and the three arrays of `Kept`.
    """
    *factors, counts, channels, listed = rest
    # All layers at once, their number padded to a power of two: one scan and one sum for all.
    layers = thresholds.shape[0]
    layer, lane = jnp.arange(power_of_two(layers)), jnp.arange(rows)
    channel = chunk * rows + lane
    real = (layer < layers)[:, None] & (channel < size)[None, :]

    # All loads before any arithmetic.
    own_thresholds = plt.load(thresholds.at[layer[:, None], channel[None, :]], mask=real, other=jnp.inf)
    times = [factors[0][b] for b in range(len(values))] if factors else [None] * len(values)
    first, later = real, own_thresholds
    if nested.alone != 1:  # of a first plane, the next one's
        first = real & (layer % nested.planes == 0)[:, None]
        later = plt.load(thresholds.at[layer[:, None] + 1, channel[None, :]], mask=first, other=0.0)

    def reached(v: Any, line: Any, factor: Any) -> Any:
        return jnp.abs(v.astype(jnp.float32))[None, :] >= (line if factor is None else line * factor)

    own = [reached(v, own_thresholds, factor) & real for v, factor in zip(values, times, strict=True)]
    any_keeps = functools.reduce(jnp.logical_or, own).astype(jnp.int32)
    before = jnp.cumsum(any_keeps, axis=1)
    count = jnp.sum(any_keeps, axis=1)
    # Every lane gets a place of its own, so the whole list is written and nothing in it is left undefined.
    at = jnp.where(any_keeps > 0, before - 1, count[:, None] + lane[None, :] - before)
    written = jnp.broadcast_to((layer < layers)[:, None], at.shape)
    plt.store(channels.at[layer[:, None], chunk, at], jnp.broadcast_to(channel[None, :], at.shape), mask=written)
    for b, (v, keeps) in enumerate(zip(values, own, strict=True)):
        each = jnp.broadcast_to(v[None, :], at.shape)
        if nested.alone != 1:
            each = jnp.where(first & ~reached(v, later, times[b]), scaled(each, nested.alone), each)
        value = jnp.where(keeps, each, 0).astype(listed.dtype)
        plt.store(listed.at[layer[:, None], chunk, b, at], value, mask=written)
    plt.store(counts.at[layer, chunk], count, mask=layer < layers)


def _plain_kernel(x: Any, thresholds: Any, *rest: Any, rows: int, nested: Nested):
    chunk, (batch, size) = pl.program_id(0), x.shape
    channel = chunk * rows + jnp.arange(rows)
    values = [plt.load(x.at[b, channel], mask=channel < size, other=0) for b in range(batch)]
    _write(values, chunk, size, rows, thresholds, rest, nested)


def _norm_kernel(*refs: Any, rows: int, nested: Nested, eps: float, parts: int, biased: bool):
    x, weight, thresholds, *rest = refs
    product = rest.pop(0) if parts else None
    bias = rest.pop(0) if biased else None
    new_x = rest.pop(-4)
    chunk, (batch, size) = pl.program_id(0), x.shape
    whole, own = jnp.arange(power_of_two(size)), chunk * rows + jnp.arange(rows)

    def stream(b: int, at: Any) -> Any:
        """The new residual stream of sequence b at some channels."""
        mask = at < size
        old = plt.load(x.at[b, at], mask=mask, other=0)
        if product is None:
            return old
        added = functools.reduce(
            jnp.add, [plt.load(product.at[s, b, at], mask=mask, other=0.0) for s in range(parts)]
        ).astype(old.dtype)
        if bias is not None:
            added = added + plt.load(bias.at[at], mask=mask, other=0)
        return old + added

    gain = plt.load(weight.at[own], mask=own < size, other=0)
    values = []
    for b in range(batch):
        f = stream(b, whole).astype(jnp.float32)
        scale = lax.rsqrt(jnp.sum(f * f) / size + eps)
        mine = stream(b, own)
        plt.store(new_x.at[b, own], mine, mask=own < size)
        values.append(gain * (mine.astype(jnp.float32) * scale).astype(mine.dtype))
    _write(values, chunk, size, rows, thresholds, rest, nested)


def _gated_kernel(*refs: Any, rows: int, nested: Nested, parts: int, dtype: Any, biases: tuple[bool, bool]):
    gate, up, thresholds, *rest = refs
    sources = [gate, up]
    added = [rest.pop(0) if present else None for present in biases]
    chunk, (_, batch, size) = pl.program_id(0), sources[0].shape
    channel = chunk * rows + jnp.arange(rows)
    mask = channel < size

    def read(which: int, b: int) -> Any:
        loads = [plt.load(sources[which].at[s, b, channel], mask=mask, other=0.0) for s in range(parts)]
        y, bias = functools.reduce(jnp.add, loads).astype(dtype), added[which]
        return y if bias is None else y + plt.load(bias.at[channel], mask=mask, other=0)

    values = []
    for b in range(batch):
        g, u = read(0, b).astype(jnp.float32), read(1, b).astype(jnp.float32)
        values.append((g / (1.0 + jnp.exp(-g)) * u).astype(dtype))
    _write(values, chunk, size, rows, thresholds, rest, nested)


def _attention_kernel(
    partial: Any, highest: Any, total: Any, thresholds: Any, *rest: Any, rows: int, dtype: Any, nested: Nested
):
    chunk, (batch, splits, size) = pl.program_id(0), partial.shape
    channel = chunk * rows + jnp.arange(rows)
    mask = channel < size
    head = jnp.minimum(channel // (size // highest.shape[2]), highest.shape[2] - 1)
    values = []
    for b in range(batch):
        # All loads before any arithmetic, so that they are in flight together.
        tops = [plt.load(highest.at[b, s, head]) for s in range(splits)]
        weights = [plt.load(total.at[b, s, head]) for s in range(splits)]
        outs = [plt.load(partial.at[b, s, channel], mask=mask, other=0.0) for s in range(splits)]
        top = functools.reduce(jnp.maximum, tops)
        shares = [jnp.exp(t - top) for t in tops]
        above = functools.reduce(jnp.add, [share * out for share, out in zip(shares, outs, strict=True)])
        below = functools.reduce(jnp.add, [share * weight for share, weight in zip(shares, weights, strict=True)])
        values.append((above / below).astype(dtype))
    _write(values, chunk, size, rows, thresholds, rest, nested)


def _call(kernel: Any, inputs: Sequence[Any], extra: list[Any], batch: int, thresholds: Any, rows: int, dtype: Any,
          interpret: bool, name: str, factors: Any, warps: int = WARPS) -> Any:  # fmt: skip
    layers, size = thresholds.shape[0], thresholds.shape[-1]
    chunks = -(-size // rows)
    lists = [
        jax.ShapeDtypeStruct((layers, chunks), jnp.int32),
        jax.ShapeDtypeStruct((layers, chunks, rows), jnp.int32),
        jax.ShapeDtypeStruct((layers, chunks, batch, rows), dtype),
    ]
    return pl.pallas_call(
        kernel,
        grid=(chunks,),
        out_shape=[*extra, *lists],
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name=f"{name}_{layers}x{size}",
    )(*inputs, *([] if factors is None else [factors]))


@functools.partial(jax.jit, static_argnames=("rows", "interpret", "nested"))
def select_plain(
    x: jax.Array,
    thresholds: jax.Array,
    rows: int,
    interpret: bool,
    factors: jax.Array | None = None,
    nested: Nested = WHOLE,
) -> Kept:
    """See `select`."""
    kernel = functools.partial(_plain_kernel, rows=rows, nested=nested)
    return Kept(
        *_call(kernel, (x, thresholds), [], x.shape[0], thresholds, rows, x.dtype, interpret, "select", factors)
    )


@functools.partial(jax.jit, static_argnames=("eps", "rows", "interpret", "nested"))
def select_norm(
    x: jax.Array,
    parts: jax.Array | None,
    bias: jax.Array | None,
    weight: jax.Array,
    eps: float,
    thresholds: jax.Array,
    rows: int,
    interpret: bool,
    factors: jax.Array | None = None,
    nested: Nested = WHOLE,
) -> tuple[jax.Array, Kept]:
    """See `select_norm` of the API; every program recomputes the norm of the whole stream."""
    inputs = [x, weight, thresholds, *(a for a in (parts, bias) if a is not None)]
    kernel = functools.partial(
        _norm_kernel,
        rows=rows,
        nested=nested,
        eps=eps,
        parts=0 if parts is None else len(parts),
        biased=bias is not None,
    )
    new = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    warps = WARPS if parts is None else PARTS_WARPS
    out = _call(kernel, inputs, new, x.shape[0], thresholds, rows, x.dtype, interpret, "select_norm", factors, warps)
    return out[0], Kept(*out[1:])


@functools.partial(jax.jit, static_argnames=("rows", "dtype", "interpret", "nested"))
def select_attention(
    partial: jax.Array,
    highest: jax.Array,
    total: jax.Array,
    thresholds: jax.Array,
    rows: int,
    dtype: Any,
    interpret: bool,
    factors: jax.Array | None = None,
    nested: Nested = WHOLE,
) -> Kept:
    """See `select_attention` of the API."""
    kernel = functools.partial(_attention_kernel, rows=rows, dtype=dtype, nested=nested)
    inputs = (partial, highest, total, thresholds)
    return Kept(
        *_call(kernel, inputs, [], len(partial), thresholds, rows, dtype, interpret, "select_attention", factors)
    )


@functools.partial(jax.jit, static_argnames=("rows", "dtype", "interpret", "nested"))
def select_gated(
    gate: jax.Array,
    up: jax.Array,
    gate_bias: jax.Array | None,
    up_bias: jax.Array | None,
    thresholds: jax.Array,
    rows: int,
    dtype: Any,
    interpret: bool,
    factors: jax.Array | None = None,
    nested: Nested = WHOLE,
) -> Kept:
    """See `select_gated` of the API."""
    biases = (gate_bias is not None, up_bias is not None)
    kernel = functools.partial(_gated_kernel, rows=rows, nested=nested, parts=len(gate), dtype=dtype, biases=biases)
    inputs = [gate, up, thresholds, *(a for a in (gate_bias, up_bias) if a is not None)]
    return Kept(*_call(kernel, inputs, [], gate.shape[1], thresholds, rows, dtype, interpret, "select_gated", factors))
