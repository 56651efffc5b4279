"""The instructions of a kernel that is written lane by lane, on top of the private names of JAX that it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, llvm, nvvm, scf
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.mosaic.gpu.utils import inline_ptx  # pyright: ignore[reportAttributeAccessIssue]

POLL = 10_000_000  # nanoseconds that one wait for a barrier may sleep


def load_words(address: Any, words: int) -> list[Any]:
    """One vector load from shared memory."""
    if words == 1:
        return [emit("ld.shared.b32 $0, [$1];", address, result=i32())]
    names = ", ".join(f"${k}" for k in range(words))
    return list(emit(f"ld.shared.v{words}.b32 {{{names}}}, [${words}];", address, result=[i32()] * words))


def store_floats(address: Any, values: list[Any]) -> None:
    """Vector stores to device memory."""
    for k in range(0, len(values), 4):
        some = values[k : k + 4]
        names = ", ".join(f"${q + 1}" for q in range(len(some)))
        emit(f"st.global.v{len(some)}.f32 [$0], {{{names}}};", offset(address, 4 * k), *some)


def i32() -> Any:
    return ir.IntegerType.get_signless(32)


def i64() -> Any:
    return ir.IntegerType.get_signless(64)


def f32() -> Any:
    return ir.F32Type.get()


def const(value: int) -> Any:
    return arith.constant(i32(), value)


def add(a: Any, b: int | Any) -> Any:
    return arith.addi(a, const(b) if isinstance(b, int) else b)


def mul(a: Any, b: int) -> Any:
    return arith.muli(a, const(b))


def div(a: Any, b: int) -> Any:
    return arith.divui(a, const(b))


def rem(a: Any, b: int) -> Any:
    return arith.remui(a, const(b))


def compare(how: str, a: Any, b: Any) -> Any:
    return arith.cmpi(getattr(arith.CmpIPredicate, how), a, b)


def pure(text: str, *arguments: Any, result: Any) -> Any:
    """An instruction that only computes."""
    return inline_ptx(text, *arguments, result_types=result)


def emit(text: str, *arguments: Any, result: Any = None, **how: Any) -> Any:
    """An instruction that stays where it is."""
    return inline_ptx(text, *arguments, result_types=result, has_side_effects=True, **how)


def device_address(ref: Any) -> Any:
    """As an integer of 64 bits."""
    return llvm.ptrtoint(i64(), mgpu.memref_ptr(ref))


def shared_address(ref: Any) -> Any:
    """As an integer of 32 bits."""
    return llvm.ptrtoint(i32(), mgpu.memref_ptr(ref))


def element(base: Any, index: Any, width: int) -> Any:
    """The address of an element of an array in device memory."""
    return arith.addi(base, arith.extui(i64(), mul(index, width)))


def offset(address: Any, by: int) -> Any:
    return arith.addi(address, arith.constant(i64(), by))


def barrier(address: Any) -> Any:
    return llvm.inttoptr(llvm.PointerType.get(3), address)


def wait(bar: Any, parity: Any) -> None:
    nvvm.mbarrier_try_wait_parity(bar, parity, const(POLL))


def when(condition: Any, body: Callable[[], Any]) -> None:
    op = scf.IfOp(condition)
    with ir.InsertionPoint(op.then_block):
        body()
        scf.YieldOp([])


def loop(low: Any, high: Any, step: int, init: Sequence[Any], body: Callable[[Any, list[Any]], list[Any]]) -> Any:
    op = scf.ForOp(low, high, const(step), init)
    with ir.InsertionPoint(op.body):
        scf.YieldOp(body(op.induction_variable, list(op.inner_iter_args)))
    return list(op.results)
