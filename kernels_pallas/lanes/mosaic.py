"""Lane code as MLIR and PTX, inside a Pallas kernel on the Mosaic GPU backend.

The public API works on whole thread blocks; single lanes need private names of JAX, and jax 0.11.2 or newer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, llvm, scf
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.mosaic.gpu.utils import inline_ptx  # pyright: ignore[reportAttributeAccessIssue]

from kernels_pallas.lanes.mlir_value import Value

POLLS = 1 << 22  # looks at a word that never comes, about three seconds, before the kernel gives up
STREAMED = "ld.global.L1::no_allocate.L2::cache_hint"


Mailbox = tuple[Value, Value]  # its address, and whether the lane wants it


class Mosaic:
    """The `Machine` that emits code; to be used inside `plgpu.inline_mgpu`."""

    def __init__(self, threads: int):
        self.threads = threads
        self._policy: Any = None

    def thread(self) -> Value:
        return Value(mgpu.thread_idx())

    def cta(self) -> Value:
        return Value(mgpu.block_idx())

    def warp(self) -> Value:
        return Value(mgpu.warp_idx(sync=True))

    def integer(self, value: int) -> Value:
        return Value(arith.constant(_i32(), value))

    def float32(self, value: float) -> Value:
        return Value(arith.constant(_f32(), value))

    def device(self, ref: Any) -> Value:
        return Value(llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.memref_ptr(ref)))

    def shared(self, ref: Any) -> Value:
        return Value(llvm.ptrtoint(_i32(), mgpu.memref_ptr(ref)))

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        return Value(arith.select(condition.value, a.value, b.value))

    def minimum(self, a: Value, b: Any) -> Value:
        return Value(arith.minsi(*a._both(b)))

    def maximum(self, a: Value, b: Any) -> Value:
        return a._arithmetic(b, arith.maxsi, arith.maxnumf)

    def as_float(self, bits: Value) -> Value:
        return Value(arith.bitcast(_f32(), bits.value))

    def as_bits(self, number: Value) -> Value:
        return Value(arith.bitcast(_i32(), number.value))

    def absolute(self, a: Value) -> Value:
        return self._pure("abs.f32 $0, $1;", a, result=_f32())

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        return self._pure("fma.rn.f32 $0, $1, $2, $3;", a, b, c, result=_f32())

    def exp(self, a: Value) -> Value:
        return self._pure("ex2.approx.f32 $0, $1;", a * math.log2(math.e), result=_f32())

    def reciprocal_root(self, a: Value) -> Value:
        return self._pure("rsqrt.approx.f32 $0, $1;", a, result=_f32())

    def round_bfloat16(self, a: Value) -> Value:
        text = "{ .reg .b16 t, z; mov.b16 z, 0; cvt.rn.bf16.f32 t, $1; mov.b32 $0, {z, t}; }"
        return self._pure(text, a, result=_f32())

    def permute_bytes(self, a: Value, b: Value, selector: int) -> Value:
        return self._pure(f"prmt.b32 $0, $1, $2, {selector};", a, b, result=_i32())

    def and_or(self, word: Value, mask: int, other: Value) -> Value:
        return self._pure(f"lop3.b32 $0, $1, {mask}, $2, 0xEA;", word, other, result=_i32())

    def pack_float16(self, low: Value, high: Value) -> Value:
        return self._pure("cvt.rn.f16x2.f32 $0, $2, $1;", low, high, result=_i32())

    def upper_float16(self, word: Value) -> Value:
        text = "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, h; }"
        return self._pure(text, word, result=_f32())

    def pack_bfloat16(self, low: Value, high: Value) -> Value:
        return self._pure("cvt.rn.bf16x2.f32 $0, $2, $1;", low, high, result=_i32())

    def multiply_bfloat16_pairs(self, a: Value, b: Value) -> Value:
        return self._pure("mul.rn.bf16x2 $0, $1, $2;", a, b, result=_i32())

    def popcount(self, word: Value) -> Value:
        return self._pure("popc.b32 $0, $1;", word, result=_i32())

    def mma(self, dtype: str, a: Sequence[Value], b: Sequence[Value], c: Sequence[Value]) -> list[Value]:
        text = (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, "
            "{$8, $9}, {$10, $11, $12, $13};"
        )
        return self._emit(text, *a, *b, *c, result=[_f32()] * 4, convergent=True)

    def warp_sum(self, word: Value) -> Value:
        return self._emit("redux.sync.add.u32 $0, $1, 0xffffffff;", word, result=_i32(), convergent=True)

    def warp_max(self, word: Value) -> Value:
        return self._emit("redux.sync.max.u32 $0, $1, 0xffffffff;", word, result=_i32(), convergent=True)

    def shuffle_xor(self, number: Value, distance: int) -> Value:
        text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;"
        return self._emit(text, number, result=_f32(), convergent=True)

    def prefix_sum(self, word: Value) -> Value:
        total = word
        for distance in (1, 2, 4, 8, 16):
            text = (
                f"{{ .reg .pred p; .reg .b32 t; shfl.sync.up.b32 t|p, $1, {distance}, 0, 0xffffffff; "
                "@!p mov.b32 t, 0; add.u32 $0, $1, t; }"
            )
            total = self._emit(text, total, result=_i32(), convergent=True)
        return total - word

    def multiply_high(self, a: Value, b: Value) -> Value:
        return self._pure("mul.hi.u32 $0, $1, $2;", a, b, result=_i32())

    def opaque(self, word: Value) -> Value:
        return self._emit("mov.u32 $0, $1;", word, result=_i32())

    def sync(self) -> None:
        self._emit("bar.sync 0;", convergent=True)

    def sync_warp(self) -> None:
        self._emit("bar.warp.sync 0xffffffff;", convergent=True)

    def load(self, address: Value) -> Value:
        return self._emit("ld.global.b32 $0, [$1];", address, result=_i32())

    def load_two(self, address: Value) -> list[Value]:
        return self._emit("ld.global.v2.b32 {$0, $1}, [$2];", address, result=[_i32()] * 2)

    def load_four(self, address: Value) -> list[Value]:
        return self._emit("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", address, result=[_i32()] * 4)

    def load_bfloat16(self, address: Value) -> Value:
        half = self._emit("ld.global.u16 $0, [$1];", address, result=_i32())
        return self.as_float(half << 16)

    def stream(self, address: Value) -> list[Value]:
        if self._policy is None:
            raise ValueError("stream: open_stream comes first")
        text = f"{STREAMED}.v4.b32 {{$0, $1, $2, $3}}, [$4], $5;"
        return self._emit(text, address, self._policy, result=[_i32()] * 4)

    def stream_two(self, address: Value) -> list[Value]:
        if self._policy is None:
            raise ValueError("stream: open_stream comes first")
        text = f"{STREAMED}.v2.b32 {{$0, $1}}, [$2], $3;"
        return self._emit(text, address, self._policy, result=[_i32()] * 2)

    def copy_async(self, to: Value, address: Value, when: Value) -> None:
        if self._policy is None:
            raise ValueError("copy: open_stream comes first")
        text = "{ .reg .b32 n; selp.b32 n, 16, 0, $3; cp.async.cg.shared.global.L2::cache_hint [$0], [$1], 16, n, $2; }"
        self._emit(text, to, address, self._policy, when)

    def commit_copies(self) -> None:
        self._emit("cp.async.commit_group;")

    def wait_for_copies(self, groups: int) -> None:
        self._emit(f"cp.async.wait_group {groups};")

    def open_stream(self) -> None:
        text = "createpolicy.fractional.L2::evict_first.b64 $0, 1.0;"
        self._policy = self._emit(text, result=ir.IntegerType.get_signless(64))

    def store(self, address: Value, word: Value, when: Value) -> None:
        self._emit("@$2 st.global.b32 [$0], $1;", address, word, when)

    def store_bfloat16(self, address: Value, number: Value, when: Value) -> None:
        text = "{ .reg .b16 l, h; mov.b32 {l, h}, $1; @$2 st.global.b16 [$0], h; }"
        self._emit(text, address, number, when)

    def read(self, address: Value) -> Value:
        return self._emit("ld.shared.b32 $0, [$1];", address, result=_i32())

    def read_or_zero(self, address: Value, when: Value) -> Value:
        text = "{ .reg .b32 t; mov.b32 t, 0; @$2 ld.shared.b32 t, [$1]; mov.b32 $0, t; }"
        return self._emit(text, address, when, result=_i32())

    def read_four_or_zeros(self, address: Value, when: Value) -> list[Value]:
        text = (
            "{ .reg .b32 t<4>; mov.b32 t0, 0; mov.b32 t1, 0; mov.b32 t2, 0; mov.b32 t3, 0; "
            "@$5 ld.shared.v4.b32 {t0, t1, t2, t3}, [$4]; "
            "mov.b32 $0, t0; mov.b32 $1, t1; mov.b32 $2, t2; mov.b32 $3, t3; }"
        )
        return self._emit(text, address, when, result=[_i32()] * 4)

    def read_two(self, address: Value) -> list[Value]:
        return self._emit("ld.shared.v2.b32 {$0, $1}, [$2];", address, result=[_i32()] * 2)

    def read_four(self, address: Value) -> list[Value]:
        return self._emit("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", address, result=[_i32()] * 4)

    def write(self, address: Value, words: Sequence[Value], when: Value | None = None) -> None:
        n = len(words)
        names = ", ".join(f"${k + 1}" for k in range(n))
        some = f".b32 [$0], {names};" if n == 1 else f".v{n}.b32 [$0], {{{names}}};"
        guard, last = ("", []) if when is None else (f"@${n + 1} ", [when])
        self._emit(f"{guard}st.shared{some}", address, *words, *last)

    def append(self, address: Value, word: Value, mask: Value, bit: int) -> Value:
        text = (
            f"{{ .reg .pred p; .reg .b32 t, n; and.b32 t, $3, {bit}; setp.ne.b32 p, t, 0; mov.b32 n, $1; "
            "@p st.shared.b32 [n], $2; @p add.u32 n, n, 4; mov.b32 $0, n; }"
        )
        return self._emit(text, address, word, mask, result=_i32())

    def read_address(self, address: Value) -> Value:
        return self._emit("ld.shared.b64 $0, [$1];", address, result=ir.IntegerType.get_signless(64))

    def write_address(self, address: Value, value: Value, when: Value) -> None:
        self._emit("@$2 st.shared.b64 [$0], $1;", address, value, when)

    def send(self, address: Value, word: Value, flag: Value, when: Value) -> None:
        # The hardware keeps aligned 8 bytes of a vector store together, as libraries of collectives rely on.
        self._emit("@$3 st.relaxed.gpu.global.v2.b32 [$0], {$1, $2};", address, word, flag, when)

    def poll(self, pairs: Sequence[Mailbox], singles: Sequence[Mailbox], flag: Value) -> list[Value]:
        mailboxes = [*((box, 2) for box in pairs), *((box, 1) for box in singles)]
        words = 2 * len(pairs) + len(singles)
        loads, w, want = [], 0, f"${words + 2 * len(mailboxes)}"
        for i, (_, many) in enumerate(mailboxes):
            names = ", ".join(f"v{k}, t{k}" for k in range(w, w + many))
            where, when = f"${words + 2 * i}", f"${words + 2 * i + 1}"
            loads.append(f"@{when} ld.relaxed.gpu.global.v{2 * many}.b32 {{{names}}}, [{where}];")
            w += many
        first = " ".join(f"mov.b32 v{k}, 0; mov.b32 t{k}, {want};" for k in range(words))
        checks = f"setp.ne.b32 p, t0, {want}; "
        checks += " ".join(f"setp.ne.or.b32 p, t{k}, {want}, p;" for k in range(1, words))
        moves = " ".join(f"mov.b32 ${k}, v{k};" for k in range(words))
        text = (
            f"{{ .reg .pred p, q; .reg .b32 v<{words}>, t<{words}>, c; mov.b32 c, 0; {first}\nLOOK: {' '.join(loads)} "
            f"{checks} @!p bra FOUND; add.u32 c, c, 1; setp.gt.u32 q, c, {POLLS}; @q trap; bra LOOK;\n"
            f"FOUND: {moves} }}"
        )
        return self._emit(text, *(v for box, _ in mailboxes for v in box), flag, result=[_i32()] * words)

    def cond(
        self,
        condition: Value,
        kinds: str,
        then: Callable[[], Sequence[Value]],
        other: Callable[[], Sequence[Value]],
    ) -> list[Value]:
        op = scf.IfOp(condition.value, [_i32() if kind == "i" else _f32() for kind in kinds], has_else=True)
        for block, body in ((op.then_block, then), (op.else_block, other)):
            assert block is not None
            with ir.InsertionPoint(block):
                scf.YieldOp([v.value for v in body()])
        return [Value(r) for r in op.results]

    def when(self, condition: Value, body: Callable[[], Any]) -> None:
        op = scf.IfOp(condition.value)
        with ir.InsertionPoint(op.then_block):
            body()
            scf.YieldOp([])

    def for_loop(
        self, iterations: Value, carry: Sequence[Value], body: Callable[[Value, list[Value]], Sequence[Value]]
    ) -> list[Value]:
        zero, one = arith.constant(_i32(), 0), arith.constant(_i32(), 1)
        op = scf.ForOp(zero, iterations.value, one, [c.value for c in carry])
        with ir.InsertionPoint(op.body):
            out = body(Value(op.induction_variable), [Value(c) for c in op.inner_iter_args])
            scf.YieldOp([c.value for c in out])
        return [Value(r) for r in op.results]

    def do_while(self, body: Callable[[], Value]) -> None:
        op = scf.WhileOp([], [])
        with ir.InsertionPoint(op.before.blocks.append()):
            scf.ConditionOp(body().value, [])
        with ir.InsertionPoint(op.after.blocks.append()):
            scf.YieldOp([])

    def _pure(self, text: str, *arguments: Value, result: Any) -> Value:
        """An instruction that only computes."""
        return Value(inline_ptx(text, *(a.value for a in arguments), result_types=result))

    def _emit(self, text: str, *arguments: Value, result: Any = None, **how: Any) -> Any:
        """An instruction that stays where it is."""
        out = inline_ptx(text, *(a.value for a in arguments), result_types=result, has_side_effects=True, **how)
        if result is None:
            return None
        if not isinstance(result, list):
            return Value(out)
        return [Value(word) for word in out]


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _f32() -> Any:
    return ir.F32Type.get()
