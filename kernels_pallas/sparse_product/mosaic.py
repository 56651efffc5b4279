"""The product of listed channels on Pallas' Mosaic GPU backend, for one sequence and bfloat16 weights, on Hopper.

One block of threads multiplies the lists of one split with one tile of columns. Its second warpgroup copies the listed
rows' segments into a ring in shared memory, each by one bulk copy; the first adds `value * segment` in registers. What
is in flight is then bounded by shared memory instead of registers, and no thread waits for an address to arrive.

The public API copies blocks, and one block a row is slower than the Triton kernel. So the body is written lane by lane
in MLIR and PTX, through private names of JAX: this is the only file that needs them, and jax 0.11 or newer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, llvm, nvvm, scf
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.mosaic.gpu.utils import inline_ptx  # pyright: ignore[reportAttributeAccessIssue]
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.kept import Kept
from kernels_pallas.sparse_product.config import Ring

WARPGROUP, WARPS = 128, 4  # threads and warps of a warpgroup
BARRIER = 8  # bytes
POLL = 10_000_000  # nanoseconds that one wait for a barrier may sleep


@functools.partial(jax.jit, static_argnames="ring")
def sparse_product_mosaic(kept: Kept, weights: Sequence[jax.Array], ring: Ring) -> tuple[jax.Array, ...]:
    """See `sparse_product`; one launch for all layers."""
    sizes = tuple(w.shape[1] for w in weights)
    splits = -(-kept.chunks // ring.lists)
    count = len(kept) + 2 * len(weights) + 4
    body = functools.partial(_body, ring=ring, sizes=sizes, chunks=kept.chunks)

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
            plgpu.SMEM((ring.slots * ring.group * ring.block_columns,), jnp.bfloat16),
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )
    return tuple(call(*kept, *weights))


def _body(*refs: Any, ring: Ring, sizes: tuple[int, ...], chunks: int):
    layers = len(sizes)
    counts, channels, values = (_device(ref) for ref in refs[:3])
    weights, outs = (tuple(_device(r) for r in refs[at : at + layers]) for at in (3, 3 + layers))
    rows_s, values_s, bars, ring_s = (_shared(ref) for ref in refs[3 + 2 * layers :])
    thread, warp = mgpu.thread_idx(), mgpu.warp_idx(sync=True)
    group, width = ring.group, 2 * ring.block_columns  # rows of a slot, bytes of a row's segment

    tiles = [size // ring.block_columns for size in sizes]
    tile, split = _rem(mgpu.block_idx(), sum(tiles)), _div(mgpu.block_idx(), sum(tiles))
    layer, first, size, weight, out = _int(0), _int(0), _int(sizes[0]), weights[0], outs[0]
    for i in range(1, layers):
        here = _is("uge", tile, _int(sum(tiles[:i])))
        layer, first = arith.select(here, _int(i), layer), arith.select(here, _int(sum(tiles[:i])), first)
        size, weight = arith.select(here, _int(sizes[i]), size), arith.select(here, weights[i], weight)
        out = arith.select(here, outs[i], out)
    column = _mul(arith.subi(tile, first), ring.block_columns)

    def full(slot: Any) -> Any:
        return _barrier(_add(bars, _mul(slot, BARRIER)))

    def empty(slot: Any) -> Any:
        return _barrier(_add(bars, _mul(_add(slot, ring.slots), BARRIER)))

    def place(turn: Any) -> tuple[Any, Any]:
        """The slot of a group of rows, and the parity of its round."""
        return _rem(turn, ring.slots), arith.andi(_div(turn, ring.slots), _int(1))

    def init() -> None:
        nvvm.mbarrier_init(full(thread), _int(1))
        nvvm.mbarrier_init(empty(thread), _int(WARPS))
        _ptx("fence.mbarrier_init.release.cluster;")
        _ptx("fence.proxy.async.shared::cta;")

    _when(_is("ult", thread, _int(ring.slots)), init)
    total = _stage(ring, chunks, layer, split, thread, (counts, channels, values), (rows_s, values_s))
    groups = _div(_add(total, group - 1), group)
    _ptx("bar.sync 0;", convergent=True)

    def produce() -> None:
        lane, own = _rem(thread, 32), arith.subi(warp, _int(WARPS))
        source, stride = _element(weight, column, 2), arith.extui(_i64(), _mul(size, 2))
        policy = _ptx("createpolicy.fractional.L2::evict_first.b64 $0, 1.0;", result=_i64())
        copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"

        def issue(turn: Any, _: Any) -> list[Any]:
            slot, parity = place(turn)
            entry, left = _add(_mul(turn, group), lane), arith.subi(total, _mul(turn, group))
            real = arith.andi(_is("slt", lane, _int(group)), _is("slt", lane, left))
            entry = arith.minsi(entry, arith.subi(total, _int(1)))
            row = _ptx("ld.shared.b32 $0, [$1];", _add(rows_s, _mul(entry, 4)), result=_i32())
            _wait(empty(slot), arith.xori(parity, _int(1)))
            coming = _mul(arith.minsi(left, _int(group)), width)
            nvvm.mbarrier_arrive_expect_tx(full(slot), coming, predicate=_is("eq", lane, _int(0)))
            _ptx("bar.warp.sync 0xffffffff;", convergent=True)
            to = _add(ring_s, _mul(_add(_mul(slot, group), lane), width))
            segment = arith.addi(source, arith.muli(arith.extui(_i64(), row), stride))
            bar = _add(bars, _mul(slot, BARRIER))
            _ptx(f"@$5 {copy} [$0], [$1], $2, [$3], $4;", to, segment, _int(width), bar, policy, real)
            return []

        _loop(own, groups, WARPS, [], issue)

    def consume() -> None:
        each = ring.block_columns // WARPGROUP  # columns of a thread
        start = _add(ring_s, _mul(thread, 2 * each))
        leader = _is("eq", _rem(thread, 32), _int(0))

        def read(slot: Any, row: Any, entry: Any) -> tuple[list[Any], Any]:
            """A thread's part of one row, two columns a word, and the channel's value."""
            words = _vector_load(_add(start, _mul(_add(_mul(slot, group), row), width)), each // 2)
            return words, _ptx("ld.shared.f32 $0, [$1];", _add(values_s, _mul(entry, 4)), result=_f32())

        def whole(turn: Any, totals: list[Any]) -> list[Any]:
            slot, parity = place(turn)
            _wait(full(slot), parity)
            rows = [read(slot, _int(k), _add(_mul(turn, group), k)) for k in range(group)]
            for words, value in rows:
                totals = _accumulate(totals, words, value)
            _ptx("bar.warp.sync 0xffffffff;", convergent=True)
            arrive = "mbarrier.arrive.release.cta.shared::cta.b64 _, [$0];"
            _ptx(arrive, _add(bars, _mul(_add(slot, ring.slots), BARRIER)), predicate=leader)
            return totals

        complete = _div(total, group)
        totals = _loop(_int(0), complete, 1, [arith.constant(_f32(), 0.0)] * each, whole)
        slot, parity = place(complete)
        _when(_is("ult", complete, groups), lambda: _wait(full(slot), parity))

        def last(row: Any, totals: list[Any]) -> list[Any]:
            return _accumulate(totals, *read(slot, row, arith.addi(_mul(complete, group), row)))

        totals = _loop(_int(0), arith.subi(total, _mul(complete, group)), 1, totals, last)
        at = arith.addi(arith.addi(arith.muli(split, size), column), _mul(thread, each))
        _vector_store(_element(out, at, 4), totals)

    _when(_is("uge", warp, _int(WARPS)), produce)
    _when(_is("ult", warp, _int(WARPS)), consume)


def _stage(ring: Ring, chunks: int, layer: Any, split: Any, thread: Any, lists: Any, shared: Any) -> Any:
    """Bring the lists of the split into shared memory, one after the other; their length in all."""
    (counts, channels, values), (rows_s, values_s) = lists, shared
    turns = -(-ring.rows // (2 * WARPGROUP))
    lengths, loads = [], []
    for i in range(ring.lists):
        chunk = _add(_mul(split, ring.lists), i)
        at = arith.addi(_mul(layer, chunks), arith.minsi(chunk, _int(chunks - 1)))
        length = _ptx("ld.global.b32 $0, [$1];", _element(counts, at, 4), result=_i32())
        lengths.append(arith.select(_is("ult", chunk, _int(chunks)), length, _int(0)))
        for turn in range(turns):
            # A list is written to its end, so that loads need not wait for its length.
            entry = _add(thread, 2 * WARPGROUP * turn)
            where = arith.addi(_mul(at, ring.rows), arith.minsi(entry, _int(ring.rows - 1)))
            row = _ptx("ld.global.b32 $0, [$1];", _element(channels, where, 4), result=_i32())
            half = _ptx("ld.global.u16 $0, [$1];", _element(values, where, 2), result=_i32())
            loads.append((i, entry, row, arith.shli(half, _int(16))))  # a bfloat16 is the upper half of a float32
    before = [_int(0)]
    for length in lengths:
        before.append(arith.addi(before[-1], length))
    for i, entry, row, value in loads:
        to, real = _mul(arith.addi(before[i], entry), 4), _is("slt", entry, lengths[i])
        _ptx("st.shared.b32 [$0], $1;", arith.addi(rows_s, to), row, predicate=real)
        _ptx("st.shared.b32 [$0], $1;", arith.addi(values_s, to), value, predicate=real)
    return before[-1]


def _accumulate(totals: list[Any], words: list[Any], value: Any) -> list[Any]:
    halves = [half for word in words for half in (arith.shli(word, _int(16)), arith.andi(word, _int(-65536)))]
    multiply = functools.partial(inline_ptx, "fma.rn.f32 $0, $1, $2, $3;", result_types=_f32())
    return [multiply(arith.bitcast(_f32(), h), value, t) for h, t in zip(halves, totals, strict=True)]


def _vector_load(address: Any, words: int) -> list[Any]:
    if words == 1:
        return [_ptx("ld.shared.b32 $0, [$1];", address, result=_i32())]
    names = ", ".join(f"${k}" for k in range(words))
    return list(_ptx(f"ld.shared.v{words}.b32 {{{names}}}, [${words}];", address, result=[_i32()] * words))


def _vector_store(address: Any, values: list[Any]) -> None:
    for k in range(0, len(values), 4):
        some = values[k : k + 4]
        names = ", ".join(f"${q + 1}" for q in range(len(some)))
        where = arith.addi(address, arith.constant(_i64(), 4 * k))
        _ptx(f"st.global.v{len(some)}.f32 [$0], {{{names}}};", where, *some)


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _i64() -> Any:
    return ir.IntegerType.get_signless(64)


def _f32() -> Any:
    return ir.F32Type.get()


def _int(value: int) -> Any:
    return arith.constant(_i32(), value)


def _add(a: Any, b: int | Any) -> Any:
    return arith.addi(a, _int(b) if isinstance(b, int) else b)


def _mul(a: Any, b: int) -> Any:
    return arith.muli(a, _int(b))


def _div(a: Any, b: int) -> Any:
    return arith.divui(a, _int(b))


def _rem(a: Any, b: int) -> Any:
    return arith.remui(a, _int(b))


def _is(how: str, a: Any, b: Any) -> Any:
    return arith.cmpi(getattr(arith.CmpIPredicate, how), a, b)


def _ptx(text: str, *arguments: Any, result: Any = None, **how: Any) -> Any:
    return inline_ptx(text, *arguments, result_types=result, has_side_effects=True, **how)


def _device(ref: Any) -> Any:
    return llvm.ptrtoint(_i64(), mgpu.memref_ptr(ref))


def _shared(ref: Any) -> Any:
    return llvm.ptrtoint(_i32(), mgpu.memref_ptr(ref))


def _element(base: Any, index: Any, width: int) -> Any:
    return arith.addi(base, arith.extui(_i64(), _mul(index, width)))


def _barrier(address: Any) -> Any:
    return llvm.inttoptr(llvm.PointerType.get(3), address)


def _wait(bar: Any, parity: Any) -> None:
    nvvm.mbarrier_try_wait_parity(bar, parity, _int(POLL))


def _when(condition: Any, body: Callable[[], Any]) -> None:
    op = scf.IfOp(condition)
    with ir.InsertionPoint(op.then_block):
        body()
        scf.YieldOp([])


def _loop(low: Any, high: Any, step: int, init: Sequence[Any], body: Callable[[Any, list[Any]], list[Any]]) -> Any:
    op = scf.ForOp(low, high, _int(step), init)
    with ir.InsertionPoint(op.body):
        scf.YieldOp(body(op.induction_variable, list(op.inner_iter_args)))
    return list(op.results)
