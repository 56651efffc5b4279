"""The product of listed channels on Pallas' Mosaic GPU backend, on Hopper, for one sequence in bfloat16.

One block of threads multiplies the lists of one split with one tile of columns. Its second warpgroup copies the listed
rows' segments into a ring in shared memory, each by one bulk copy; the first adds `value * segment` in registers. What
is in flight is then bounded by shared memory instead of registers, and no thread waits for an address to arrive.

The public API copies blocks, and one block a row is slower than the Triton kernel. So the body is written lane by lane
in MLIR and PTX (`ptx.py`), which needs private names of JAX, and jax 0.11 or newer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.lib.mlir.dialects import arith, nvvm
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.kept import Kept
from kernels_pallas.sparse_product import ptx
from kernels_pallas.sparse_product.config import Ring

WARPGROUP, WARPS = 128, 4  # threads and warps of a warpgroup
BARRIER = 8  # bytes


@functools.partial(jax.jit, static_argnames="ring")
def sparse_product_mosaic(
    kept: Kept, weights: Sequence[jax.Array], scales: Sequence[jax.Array | None], ring: Ring
) -> tuple[jax.Array, ...]:
    """See `sparse_product`; one launch for all layers, whose weights are all bfloat16 or all int8 with scales."""
    sizes, dtype = tuple(w.shape[1] for w in weights), weights[0].dtype
    splits = -(-kept.chunks // ring.lists)
    present = [scale for scale in scales if scale is not None]
    inputs = [*kept, *weights, *present]
    count = len(inputs) + len(weights) + 4
    body = functools.partial(_body, ring=ring, sizes=sizes, chunks=kept.chunks, scaled=bool(present))

    def kernel(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * count)
        def emit(_: Any, *refs: Any) -> None:
            body(*refs)

        emit(*refs)

    kernel.__name__ = f"sparse_product_{weights[0].shape[0]}x{sum(sizes)}"
    entries = ring.lists * ring.rows
    call = plgpu.kernel(
        kernel,
        out_type=tuple(jax.ShapeDtypeStruct((splits, 1, size), jnp.float32) for size in sizes),
        grid=(splits * sum(size // ring.block_columns for size in sizes),),
        grid_names=("program",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((entries,), jnp.int32),
            plgpu.SMEM((entries,), jnp.float32),
            plgpu.SMEM((2 * ring.slots * BARRIER // 4,), jnp.int32),
            plgpu.SMEM((ring.slots * ring.group * ring.block_columns,), dtype),
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )
    return tuple(call(*inputs))


def _body(*refs: Any, ring: Ring, sizes: tuple[int, ...], chunks: int, scaled: bool):
    layers = len(sizes)
    arrays = [ptx.device_address(ref) for ref in refs[:-4]]
    rows_s, values_s, bars, ring_s = (ptx.shared_address(ref) for ref in refs[-4:])
    (counts, channels, values), weights, outs = arrays[:3], arrays[3 : 3 + layers], arrays[-layers:]
    scales = arrays[3 + layers : 3 + 2 * layers] if scaled else outs
    thread, warp = mgpu.thread_idx(), mgpu.warp_idx(sync=True)
    item = 1 if scaled else 2  # bytes of a weight
    group, width = ring.group, item * ring.block_columns  # rows of a slot, bytes of a row's segment

    tiles = [size // ring.block_columns for size in sizes]
    tile, split = ptx.rem(mgpu.block_idx(), sum(tiles)), ptx.div(mgpu.block_idx(), sum(tiles))
    layer, first, size = ptx.const(0), ptx.const(0), ptx.const(sizes[0])
    weight, out, scale = weights[0], outs[0], scales[0]
    for i in range(1, layers):
        here = ptx.compare("uge", tile, ptx.const(sum(tiles[:i])))
        layer, first = arith.select(here, ptx.const(i), layer), arith.select(here, ptx.const(sum(tiles[:i])), first)
        size, weight = arith.select(here, ptx.const(sizes[i]), size), arith.select(here, weights[i], weight)
        out, scale = arith.select(here, outs[i], out), arith.select(here, scales[i], scale)
    column = ptx.mul(arith.subi(tile, first), ring.block_columns)

    def full(slot: Any) -> Any:
        return ptx.barrier(ptx.add(bars, ptx.mul(slot, BARRIER)))

    def empty(slot: Any) -> Any:
        return ptx.barrier(ptx.add(bars, ptx.mul(ptx.add(slot, ring.slots), BARRIER)))

    def place(turn: Any) -> tuple[Any, Any]:
        """The slot of a group of rows, and the parity of its round."""
        return ptx.rem(turn, ring.slots), arith.andi(ptx.div(turn, ring.slots), ptx.const(1))

    def init() -> None:
        nvvm.mbarrier_init(full(thread), ptx.const(1))
        nvvm.mbarrier_init(empty(thread), ptx.const(WARPS))
        ptx.emit("fence.mbarrier_init.release.cluster;")
        ptx.emit("fence.proxy.async.shared::cta;")

    ptx.when(ptx.compare("ult", thread, ptx.const(ring.slots)), init)
    total = _stage(ring, chunks, layer, split, thread, (counts, channels, values), (rows_s, values_s))
    groups = ptx.div(ptx.add(total, group - 1), group)
    ptx.emit("bar.sync 0;", convergent=True)

    def produce() -> None:
        lane, own = ptx.rem(thread, 32), arith.subi(warp, ptx.const(WARPS))
        source, stride = ptx.element(weight, column, item), arith.extui(ptx.i64(), ptx.mul(size, item))
        policy = ptx.emit("createpolicy.fractional.L2::evict_first.b64 $0, 1.0;", result=ptx.i64())
        copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"

        def issue(turn: Any, _: Any) -> list[Any]:
            slot, parity = place(turn)
            entry, left = ptx.add(ptx.mul(turn, group), lane), arith.subi(total, ptx.mul(turn, group))
            real = arith.andi(ptx.compare("slt", lane, ptx.const(group)), ptx.compare("slt", lane, left))
            entry = arith.minsi(entry, arith.subi(total, ptx.const(1)))
            row = ptx.emit("ld.shared.b32 $0, [$1];", ptx.add(rows_s, ptx.mul(entry, 4)), result=ptx.i32())
            ptx.wait(empty(slot), arith.xori(parity, ptx.const(1)))
            coming = ptx.mul(arith.minsi(left, ptx.const(group)), width)
            nvvm.mbarrier_arrive_expect_tx(full(slot), coming, predicate=ptx.compare("eq", lane, ptx.const(0)))
            ptx.emit("bar.warp.sync 0xffffffff;", convergent=True)
            to = ptx.add(ring_s, ptx.mul(ptx.add(ptx.mul(slot, group), lane), width))
            segment = arith.addi(source, arith.muli(arith.extui(ptx.i64(), row), stride))
            bar = ptx.add(bars, ptx.mul(slot, BARRIER))
            ptx.emit(f"@$5 {copy} [$0], [$1], $2, [$3], $4;", to, segment, ptx.const(width), bar, policy, real)
            return []

        ptx.loop(own, groups, WARPS, [], issue)

    def consume() -> None:
        each = ring.block_columns // WARPGROUP  # columns of a thread
        start = ptx.add(ring_s, ptx.mul(thread, item * each))
        leader = ptx.compare("eq", ptx.rem(thread, 32), ptx.const(0))

        def read(slot: Any, row: Any, entry: Any) -> tuple[list[Any], Any]:
            """A thread's part of one row, two or four columns a word, and the channel's value."""
            words = ptx.load_words(ptx.add(start, ptx.mul(ptx.add(ptx.mul(slot, group), row), width)), item * each // 4)
            return words, ptx.emit("ld.shared.f32 $0, [$1];", ptx.add(values_s, ptx.mul(entry, 4)), result=ptx.f32())

        def whole(turn: Any, totals: list[Any]) -> list[Any]:
            slot, parity = place(turn)
            ptx.wait(full(slot), parity)
            rows = [read(slot, ptx.const(k), ptx.add(ptx.mul(turn, group), k)) for k in range(group)]
            for words, value in rows:
                totals = _accumulate(totals, words, value, item)
            ptx.emit("bar.warp.sync 0xffffffff;", convergent=True)
            arrive = "mbarrier.arrive.release.cta.shared::cta.b64 _, [$0];"
            ptx.emit(arrive, ptx.add(bars, ptx.mul(ptx.add(slot, ring.slots), BARRIER)), predicate=leader)
            return totals

        complete = ptx.div(total, group)
        totals = ptx.loop(ptx.const(0), complete, 1, [arith.constant(ptx.f32(), 0.0)] * each, whole)
        slot, parity = place(complete)
        ptx.when(ptx.compare("ult", complete, groups), lambda: ptx.wait(full(slot), parity))

        def last(row: Any, totals: list[Any]) -> list[Any]:
            return _accumulate(totals, *read(slot, row, arith.addi(ptx.mul(complete, group), row)), item)

        totals = ptx.loop(ptx.const(0), arith.subi(total, ptx.mul(complete, group)), 1, totals, last)
        if scaled:
            at = ptx.element(scale, ptx.add(column, ptx.mul(thread, each)), 4)
            factors = [
                ptx.emit("ld.global.f32 $0, [$1];", ptx.offset(at, 4 * k), result=ptx.f32()) for k in range(each)
            ]
            totals = [arith.mulf(total, factor) for total, factor in zip(totals, factors, strict=True)]
        at = arith.addi(arith.addi(arith.muli(split, size), column), ptx.mul(thread, each))
        ptx.store_floats(ptx.element(out, at, 4), totals)

    ptx.when(ptx.compare("uge", warp, ptx.const(WARPS)), produce)
    ptx.when(ptx.compare("ult", warp, ptx.const(WARPS)), consume)


def _stage(ring: Ring, chunks: int, layer: Any, split: Any, thread: Any, lists: Any, shared: Any) -> Any:
    """Bring the lists of the split into shared memory, one after the other; their length in all."""
    (counts, channels, values), (rows_s, values_s) = lists, shared
    turns = -(-ring.rows // (2 * WARPGROUP))
    lengths, loads = [], []
    for i in range(ring.lists):
        chunk = ptx.add(ptx.mul(split, ring.lists), i)
        at = arith.addi(ptx.mul(layer, chunks), arith.minsi(chunk, ptx.const(chunks - 1)))
        length = ptx.emit("ld.global.b32 $0, [$1];", ptx.element(counts, at, 4), result=ptx.i32())
        lengths.append(arith.select(ptx.compare("ult", chunk, ptx.const(chunks)), length, ptx.const(0)))
        for turn in range(turns):
            # A list is written to its end, so that loads need not wait for its length.
            entry = ptx.add(thread, 2 * WARPGROUP * turn)
            where = arith.addi(ptx.mul(at, ring.rows), arith.minsi(entry, ptx.const(ring.rows - 1)))
            row = ptx.emit("ld.global.b32 $0, [$1];", ptx.element(channels, where, 4), result=ptx.i32())
            half = ptx.emit("ld.global.u16 $0, [$1];", ptx.element(values, where, 2), result=ptx.i32())
            loads.append((i, entry, row, arith.shli(half, ptx.const(16))))  # a bfloat16 is the upper half of a float32
    before = [ptx.const(0)]
    for length in lengths:
        before.append(arith.addi(before[-1], length))
    for i, entry, row, value in loads:
        to, real = ptx.mul(arith.addi(before[i], entry), 4), ptx.compare("slt", entry, lengths[i])
        ptx.emit("st.shared.b32 [$0], $1;", arith.addi(rows_s, to), row, predicate=real)
        ptx.emit("st.shared.b32 [$0], $1;", arith.addi(values_s, to), value, predicate=real)
    return before[-1]


def _accumulate(totals: list[Any], words: list[Any], value: Any, item: int) -> list[Any]:
    """Add `value` times the weights that the words hold, of `item` bytes each."""
    multiply = functools.partial(ptx.pure, "fma.rn.f32 $0, $1, $2, $3;", result=ptx.f32())
    unpacked = [weight for word in words for weight in (_from_bfloat16(word) if item == 2 else _from_int8(word))]
    return [multiply(weight, value, total) for weight, total in zip(unpacked, totals, strict=True)]


def _from_bfloat16(word: Any) -> list[Any]:
    """A bfloat16 is the upper half of a float32."""
    return [
        arith.bitcast(ptx.f32(), half)
        for half in (arith.shli(word, ptx.const(16)), arith.andi(word, ptx.const(-65536)))
    ]


def _from_int8(word: Any) -> list[Any]:
    """As the lowest byte of the float32 2^23 a byte counts in ones; 128 is added to each first, to make it positive."""
    positive, offset = arith.xori(word, ptx.const(-0x7F7F7F80)), arith.constant(ptx.f32(), float(2**23 + 128))
    pick = functools.partial(ptx.pure, "prmt.b32 $0, $1, $2, $3;", positive, ptx.const(0x4B000000), result=ptx.i32())
    return [arith.subf(arith.bitcast(ptx.f32(), pick(ptx.const(0x7540 + k))), offset) for k in range(4)]
