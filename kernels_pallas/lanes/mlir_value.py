"""An integer, float, address or condition of a lane, in MLIR."""

from __future__ import annotations

from typing import Any

from jax._src.lib.mlir.dialects import arith


class Value:
    """A lane's integer, float, address or condition, with Python's operators."""

    def __init__(self, value: Any):
        self.value = value

    def _both(self, other: Any) -> tuple[Any, Any]:
        own = self.value.type
        if isinstance(other, Value):
            other = other.value
            if str(own) == "i64" and str(other.type) == "i32":
                other = arith.extui(own, other)
        else:
            other = arith.constant(own, float(other) if str(own) == "f32" else int(other))
        return self.value, other

    def _arithmetic(self, other: Any, on_integers: Any, on_floats: Any) -> Value:
        a, b = self._both(other)
        return Value((on_floats if str(a.type) == "f32" else on_integers)(a, b))

    def __add__(self, other: Any) -> Value:
        return self._arithmetic(other, arith.addi, arith.addf)

    def __sub__(self, other: Any) -> Value:
        return self._arithmetic(other, arith.subi, arith.subf)

    def __mul__(self, other: Any) -> Value:
        return self._arithmetic(other, arith.muli, arith.mulf)

    def __truediv__(self, other: Any) -> Value:
        return self._arithmetic(other, None, arith.divf)

    def __floordiv__(self, other: Any) -> Value:
        return self._arithmetic(other, arith.divui, None)

    def __mod__(self, other: Any) -> Value:
        return self._arithmetic(other, arith.remui, None)

    def __and__(self, other: Any) -> Value:
        return self._arithmetic(other, arith.andi, None)

    def __or__(self, other: Any) -> Value:
        return self._arithmetic(other, arith.ori, None)

    def __xor__(self, other: Any) -> Value:
        return self._arithmetic(other, arith.xori, None)

    def __lshift__(self, other: Any) -> Value:
        return self._arithmetic(other, arith.shli, None)

    def _compare(self, other: Any, how: str) -> Value:
        a, b = self._both(other)
        if str(a.type) == "f32":
            return Value(arith.cmpf(getattr(arith.CmpFPredicate, "O" + how.upper()), a, b))
        return Value(arith.cmpi(getattr(arith.CmpIPredicate, how if how == "eq" else "s" + how), a, b))

    def __rshift__(self, other: Any) -> Value:
        return self._arithmetic(other, arith.shrui, None)

    def __lt__(self, other: Any) -> Value:
        return self._compare(other, "lt")

    def __ge__(self, other: Any) -> Value:
        return self._compare(other, "ge")

    def equals(self, other: Any) -> Value:
        """Whether two integers are the same."""
        return self._compare(other, "eq")
