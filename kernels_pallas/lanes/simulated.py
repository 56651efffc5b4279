"""Lane code in NumPy: all lanes of all CTAs in lockstep, for tests on machines without a GPU.

What a lane sends is seen by every lane that polls later in the program, so a body that would wait for something that
is never sent is found out. Missing barriers are not, as lockstep needs none: `RaceChecker` finds those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kernels_pallas.lanes.numpy_value import Value

WARP = 32


Mailbox = tuple[Value, Value]  # its address, and whether the lane wants it


class Simulated:
    """The `Machine` that runs a body on arrays."""

    def __init__(self, ctas: int, threads: int, arrays: Sequence[np.ndarray], shared_bytes: int):
        self.threads, self.lanes = threads, ctas * threads
        self._thread = np.tile(np.arange(threads), ctas)
        self._cta = np.repeat(np.arange(ctas), threads)
        self._on = np.ones(self.lanes, bool)
        # Copies that have not arrived: whose, where to, what, and in which of the lane's groups.
        self._copies: list[Any] = []
        self._groups = np.zeros(self.lanes, int)
        sizes = [-(-a.nbytes // 16) * 16 for a in arrays]
        self._starts = np.cumsum([16, *sizes]).tolist()
        self._memory = np.zeros(self._starts[-1] + 16, np.uint8)
        for start, a in zip(self._starts[:-1], arrays, strict=True):
            self._memory[start : start + a.nbytes] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
        # As on the device, what was not written is anything but zero.
        self._shared = np.full((ctas, shared_bytes // 4), 0x7FC0DEAD, np.uint32)

    def array(self, index: int, like: np.ndarray) -> np.ndarray:
        """What an array holds now."""
        start = self._starts[index]
        return self._memory[start : start + like.nbytes].view(like.dtype).reshape(like.shape).copy()

    def thread(self) -> Value:
        return Value(self._thread)

    def cta(self) -> Value:
        return Value(self._cta)

    def warp(self) -> Value:
        return Value(self._thread // WARP)

    def integer(self, value: int) -> Value:
        return Value(np.int64(value))

    def float32(self, value: float) -> Value:
        return Value(np.float32(value))

    def device(self, ref: int) -> Value:
        return Value(np.int64(self._starts[ref]))

    def shared(self, ref: int) -> Value:
        return Value(np.int64(ref))

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        return Value(np.where(condition.value, a.value, b.value))

    def minimum(self, a: Value, b: Any) -> Value:
        return a._with(b, np.minimum)

    def maximum(self, a: Value, b: Any) -> Value:
        return a._with(b, np.fmax if a.value.dtype == np.float32 else np.maximum)

    def as_float(self, bits: Value) -> Value:
        return Value(np.asarray(bits.value & 0xFFFFFFFF, np.uint32).view(np.float32))

    def as_bits(self, number: Value) -> Value:
        return Value(np.asarray(number.value, np.float32).view(np.uint32).astype(np.int64))

    def absolute(self, a: Value) -> Value:
        return Value(np.abs(a.value))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        with np.errstate(all="ignore"):
            return Value((a.value.astype(np.float64) * b.value + c.value).astype(np.float32))

    def exp(self, a: Value) -> Value:
        with np.errstate(all="ignore"):
            return Value(np.exp(a.value))

    def reciprocal_root(self, a: Value) -> Value:
        with np.errstate(all="ignore"):
            return Value((1 / np.sqrt(a.value)).astype(np.float32))

    def round_bfloat16(self, a: Value) -> Value:
        import ml_dtypes

        with np.errstate(all="ignore"):
            return Value(np.asarray(a.value, ml_dtypes.bfloat16).astype(np.float32))

    def permute_bytes(self, a: Value, b: Value, selector: int) -> Value:
        both, out = (a.value & 0xFFFFFFFF) | ((b.value & 0xFFFFFFFF) << 32), 0
        both = np.asarray(both).astype(np.uint64)
        for k in range(4):
            byte = np.uint64((selector >> (4 * k)) & 7) * np.uint64(8)
            out = out | (((both >> byte) & np.uint64(0xFF)) << np.uint64(8 * k))
        return Value(np.asarray(out).astype(np.int64))

    def and_or(self, word: Value, mask: int, other: Value) -> Value:
        return (word & mask) | other

    def pack_float16(self, low: Value, high: Value) -> Value:
        with np.errstate(all="ignore"):
            bits = [np.asarray(v.value, np.float16).view(np.uint16).astype(np.int64) for v in (low, high)]
        return Value(bits[0] | (bits[1] << 16))

    def upper_float16(self, word: Value) -> Value:
        bits = np.asarray((word.value >> 16) & 0xFFFF, np.uint16)
        return Value(bits.view(np.float16).astype(np.float32))

    def pack_bfloat16(self, low: Value, high: Value) -> Value:
        bits = [self.as_bits(self.round_bfloat16(v)).value >> 16 for v in (low, high)]
        return Value(bits[0] | (bits[1] << 16))

    def multiply_bfloat16_pairs(self, a: Value, b: Value) -> Value:
        pairs = [[self.as_float(bits) for bits in (v << 16, v & -65536)] for v in (a, b)]
        return self.pack_bfloat16(*(x * y for x, y in zip(*pairs, strict=True)))

    def popcount(self, word: Value) -> Value:
        return Value(np.bitwise_count(word.value & 0xFFFFFFFF).astype(np.int64))

    def mma(self, dtype: str, a: Sequence[Value], b: Sequence[Value], c: Sequence[Value]) -> list[Value]:
        warps, lane = self.lanes // WARP, np.arange(WARP)
        g, q = lane // 4, lane % 4

        def numbers(words: Sequence[Value]) -> list[np.ndarray]:
            out = []
            for word in words:
                bits = np.broadcast_to(word.value, self.lanes).reshape(warps, WARP)
                for half in (bits & 0xFFFF, (bits >> 16) & 0xFFFF):
                    half = half.astype(np.uint16)
                    wide = half.view(np.float16) if dtype == "f16" else (half.astype(np.uint32) << 16).view(np.float32)
                    out.append(wide.astype(np.float64))
            return out

        left, right = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8))
        for i, values in enumerate(numbers(a)):
            left[:, g + 8 * (i // 2 % 2), 2 * q + i % 2 + 8 * (i // 4)] = values
        for i, values in enumerate(numbers(b)):
            right[:, 2 * q + i % 2 + 8 * (i // 2), g] = values
        with np.errstate(all="ignore"):
            product = left @ right
            return [
                Value((c[i].value + product[:, g + 8 * (i // 2), 2 * q + i % 2].reshape(-1)).astype(np.float32))
                for i in range(4)
            ]

    def warp_max(self, word: Value) -> Value:
        return Value(np.repeat(np.broadcast_to(word.value, self.lanes).reshape(-1, WARP).max(1), WARP))

    def shuffle_xor(self, number: Value, distance: int) -> Value:
        return Value(np.broadcast_to(number.value, self.lanes)[np.arange(self.lanes) ^ distance])

    def prefix_sum(self, word: Value) -> Value:
        warps = np.broadcast_to(word.value, self.lanes).reshape(-1, WARP)
        return Value((warps.cumsum(1) - warps).reshape(-1))

    def warp_sum(self, word: Value) -> Value:
        return Value(np.repeat(np.broadcast_to(word.value, self.lanes).reshape(-1, WARP).sum(1), WARP))

    def multiply_high(self, a: Value, b: Value) -> Value:
        return Value((a.value * b.value) >> 32)

    def opaque(self, word: Value) -> Value:
        return word

    def sync(self) -> None:
        pass

    def sync_warp(self) -> None:
        pass

    def _words(self, address: Value, words: int, on: np.ndarray) -> list[Value]:
        at = np.where(on, np.broadcast_to(address.value, self.lanes), 16)
        self._check(at, 4 * words, self._starts[-1])
        memory = self._memory.view(np.uint32)
        return [Value(memory[at // 4 + k].astype(np.int64)) for k in range(words)]

    @staticmethod
    def _check(at: np.ndarray, width: int, end: int) -> None:
        if (at < 0).any() or (at % width).any() or (at + width > end).any():
            raise IndexError(f"an address that is misaligned to {width} bytes or outside of memory")

    def load(self, address: Value) -> Value:
        return self._words(address, 1, self._on)[0]

    def load_two(self, address: Value) -> list[Value]:
        return self._words(address, 2, self._on)

    def load_four(self, address: Value) -> list[Value]:
        return self._words(address, 4, self._on)

    def load_bfloat16(self, address: Value) -> Value:
        at = np.where(self._on, np.broadcast_to(address.value, self.lanes), 16)
        self._check(at, 2, self._starts[-1])
        return self.as_float(Value(self._memory.view(np.uint16)[at // 2].astype(np.int64) << 16))

    def copy_async(self, to: Value, address: Value, when: Value) -> None:
        on = self._on & when.value
        words = [np.where(on, w.value, 0).astype(np.uint32) for w in self._words(address, 4, on)]
        self._copies.append((self._on, *self._index(to, 4, self._on), words, self._groups.copy()))

    def commit_copies(self) -> None:
        self._groups[self._on] += 1

    def wait_for_copies(self, groups: int) -> None:
        late = []
        for on, cta, at, words, group in self._copies:
            done = on & self._on & (group < self._groups - groups)
            for k, word in enumerate(words):
                self._shared[cta[done], at[done] + k] = word[done]
            late.append((on & ~done, cta, at, words, group))
        self._copies = [copy for copy in late if copy[0].any()]

    def open_stream(self) -> None:
        pass

    def stream(self, address: Value) -> list[Value]:
        return self.load_four(address)

    def stream_two(self, address: Value) -> list[Value]:
        return self.load_two(address)

    def _put(self, memory: np.ndarray, address: Value, word: np.ndarray, width: int, when: Value) -> None:
        on = self._on & when.value
        at = np.broadcast_to(address.value, self.lanes)[on]
        self._check(at, width, self._starts[-1])
        memory[at // width] = np.broadcast_to(word, self.lanes)[on]

    def store(self, address: Value, word: Value, when: Value) -> None:
        bits = self.as_bits(word) if word.value.dtype == np.float32 else word
        self._put(self._memory.view(np.uint32), address, bits.value.astype(np.uint32), 4, when)

    def store_bfloat16(self, address: Value, number: Value, when: Value) -> None:
        half = self.as_bits(number).value >> 16
        self._put(self._memory.view(np.uint16), address, half.astype(np.uint16), 2, when)

    def _index(self, address: Value, words: int, on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = np.where(on, np.broadcast_to(address.value, self.lanes), 0)
        self._check(at, 4 * words, 4 * self._shared.shape[1])
        return self._cta, at // 4

    def read(self, address: Value) -> Value:
        cta, at = self._index(address, 1, self._on)
        return Value(self._shared[cta, at].astype(np.int64))

    def read_or_zero(self, address: Value, when: Value) -> Value:
        on = self._on & when.value
        cta, at = self._index(address, 1, on)
        return Value(np.where(on, self._shared[cta, at], 0).astype(np.int64))

    def read_four_or_zeros(self, address: Value, when: Value) -> list[Value]:
        on = self._on & when.value
        cta, at = self._index(address, 4, on)
        return [Value(np.where(on, self._shared[cta, at + k], 0).astype(np.int64)) for k in range(4)]

    def read_two(self, address: Value) -> list[Value]:
        cta, at = self._index(address, 2, self._on)
        return [Value(self._shared[cta, at + k].astype(np.int64)) for k in range(2)]

    def read_four(self, address: Value) -> list[Value]:
        cta, at = self._index(address, 4, self._on)
        return [Value(self._shared[cta, at + k].astype(np.int64)) for k in range(4)]

    def write(self, address: Value, words: Sequence[Value], when: Value | None = None) -> None:
        on = self._on if when is None else self._on & when.value
        cta, at = self._index(address, len(words), on)
        for k, word in enumerate(words):
            bits = self.as_bits(word) if word.value.dtype == np.float32 else word
            self._shared[cta[on], at[on] + k] = np.broadcast_to(bits.value, self.lanes)[on].astype(np.uint32)

    def append(self, address: Value, word: Value, mask: Value, bit: int) -> Value:
        here = (mask & bit).equals(bit)
        self.write(address, [word], here)
        return self.select(here, address + 4, address)

    def read_address(self, address: Value) -> Value:
        low, high = self.read(address), self.read(address + 4)
        return Value(low.value | (high.value << 32))

    def write_address(self, address: Value, value: Value, when: Value) -> None:
        self.write(address, [Value(value.value & 0xFFFFFFFF)], when)
        self.write(address + 4, [Value(value.value >> 32)], when)

    def send(self, address: Value, word: Value, flag: Value, when: Value) -> None:
        self.store(address, word, when)
        self.store(address + 4, flag, when)

    def poll(self, pairs: Sequence[Mailbox], singles: Sequence[Mailbox], flag: Value) -> list[Value]:
        out = []
        for i, (address, when) in enumerate([*pairs, *singles]):
            on = self._on & when.value
            found = self._words(address, 4 if i < len(pairs) else 2, on)
            if any((mark.value != flag.value)[on].any() for mark in found[1::2]):
                raise RuntimeError("a lane waits for something that nobody has sent")
            out += [Value(np.where(on, word.value, 0)) for word in found[::2]]
        return out

    def cond(
        self,
        condition: Value,
        kinds: str,
        then: Callable[[], Sequence[Value]],
        other: Callable[[], Sequence[Value]],
    ) -> list[Value]:
        found: list[Sequence[Value]] = []
        for on, body in ((condition, then), (condition ^ True, other)):
            self.when(on, lambda body=body: found.append(body()))
        if len(found) == 1:
            return list(found[0])
        return [Value(np.where(condition.value, a.value, b.value)) for a, b in zip(*found, strict=True)]

    def when(self, condition: Value, body: Callable[[], Any]) -> None:
        before = self._on
        self._on = before & condition.value
        if self._on.any():
            body()
        self._on = before

    def do_while(self, body: Callable[[], Value]) -> None:
        before = self._on
        while self._on.any():
            self._on = self._on & body().value
        self._on = before

    def for_loop(
        self, iterations: Value, carry: Sequence[Value], body: Callable[[Value, list[Value]], Sequence[Value]]
    ) -> list[Value]:
        before, now = self._on, list(carry)
        for i in range(int(np.max(np.where(before, iterations.value, 0), initial=0))):
            self._on = before & (i < iterations.value)
            new = body(self.integer(i), now)
            now = [Value(np.where(self._on, n.value, c.value)) for n, c in zip(new, now, strict=True)]
        self._on = before
        return now
