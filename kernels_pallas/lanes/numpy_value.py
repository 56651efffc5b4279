"""An integer, float, address or condition of all lanes, in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


class Value:
    """The values of all lanes: an array of int64, float32 or bool, or one for all."""

    def __init__(self, value: Any):
        self.value = np.asarray(value)

    def _with(self, other: Any, how: Callable[[Any, Any], Any]) -> Value:
        other = other.value if isinstance(other, Value) else self.value.dtype.type(other)
        with np.errstate(all="ignore"):
            return Value(how(self.value, other))

    def __add__(self, other: Any) -> Value:
        return self._with(other, np.add)

    def __sub__(self, other: Any) -> Value:
        return self._with(other, np.subtract)

    def __mul__(self, other: Any) -> Value:
        return self._with(other, np.multiply)

    def __truediv__(self, other: Any) -> Value:
        return self._with(other, np.divide)

    def __floordiv__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a // np.maximum(b, 1))  # lanes that are off may divide by zero

    def __mod__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a % np.maximum(b, 1))

    def __and__(self, other: Any) -> Value:
        return self._with(other, np.bitwise_and)

    def __or__(self, other: Any) -> Value:
        return self._with(other, np.bitwise_or)

    def __xor__(self, other: Any) -> Value:
        return self._with(other, np.bitwise_xor)

    def __lshift__(self, other: Any) -> Value:
        return self._with(other, np.left_shift)

    def __rshift__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: (a & 0xFFFFFFFF) >> b)

    def __lt__(self, other: Any) -> Value:
        return self._with(other, np.less)

    def __ge__(self, other: Any) -> Value:
        return self._with(other, np.greater_equal)

    def equals(self, other: Any) -> Value:
        return self._with(other, np.equal)
