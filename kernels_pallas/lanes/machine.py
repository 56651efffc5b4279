"""What a machine of lanes can do: the language that kernels are written in here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

V = TypeVar("V")  # an integer, float, address or condition of a lane
Mailbox = tuple[V, V]  # the address of a mailbox, and whether it is waited for


@runtime_checkable  # the formats' methods check what they are given in tests
class Machine(Protocol[V]):
    """One lane's view of its machine, `Mosaic` on a GPU or `Simulated` in NumPy."""

    def thread(self) -> V:
        """The lane's index in its CTA."""
        ...

    def cta(self) -> V:
        """The CTA's index in the grid."""
        ...

    def warp(self) -> V:
        """The warp's index in its CTA, the same in all its lanes."""
        ...

    def integer(self, value: int) -> V:
        """An integer constant, the same in every lane."""
        ...

    def float32(self, value: float) -> V:
        """A float32 constant, the same in every lane."""
        ...

    def device(self, ref: Any) -> V:
        """The address of an array in device memory."""
        ...

    def shared(self, ref: Any) -> V:
        """The address of an array in shared memory."""
        ...

    def select(self, condition: V, a: V, b: V) -> V:
        """`a` where the condition holds, `b` elsewhere."""
        ...

    def minimum(self, a: V, b: Any) -> V:
        """The smaller of two integers."""
        ...

    def maximum(self, a: V, b: Any) -> V:
        """Of two integers or of two floats."""
        ...

    def as_float(self, bits: V) -> V:
        """The float that has these bits."""
        ...

    def as_bits(self, number: V) -> V:
        """The bits of a float."""
        ...

    def absolute(self, a: V) -> V:
        """The absolute value of a float."""
        ...

    def fma(self, a: V, b: V, c: V) -> V:
        """`a * b + c`, rounded once."""
        ...

    def exp(self, a: V) -> V:
        """The natural exponential of a float, to the precision of the hardware's instruction."""
        ...

    def reciprocal_root(self, a: V) -> V:
        """One over the root of a float, approximately."""
        ...

    def round_bfloat16(self, a: V) -> V:
        """To the nearest bfloat16, as a float32."""
        ...

    def permute_bytes(self, a: V, b: V, selector: int) -> V:
        """Four of the eight bytes of two words, from the lowest on; `selector` has a hexadecimal digit for each."""
        ...

    def and_or(self, word: V, mask: int, other: V) -> V:
        """`(word & mask) | other`, in one instruction."""
        ...

    def pack_float16(self, low: V, high: V) -> V:
        """Two floats as float16 in a word."""
        ...

    def upper_float16(self, word: V) -> V:
        """The float16 in the upper half of a word, as a float32."""
        ...

    def pack_bfloat16(self, low: V, high: V) -> V:
        """Two floats as bfloat16 in a word."""
        ...

    def multiply_bfloat16_pairs(self, a: V, b: V) -> V:
        """Of two words of two bfloat16 each."""
        ...

    def popcount(self, word: V) -> V:
        """How many bits of a word are 1."""
        ...

    def mma(self, dtype: str, a: Sequence[V], b: Sequence[V], c: Sequence[V]) -> list[V]:
        """`c + a @ b` of the whole warp on the tensor cores, 16 x 16 by 16 x 8, every lane with its fragments."""
        ...

    def warp_sum(self, word: V) -> V:
        """The sum of the integers of the lanes of the warp."""
        ...

    def warp_max(self, word: V) -> V:
        """The highest integer of the lanes of the warp."""
        ...

    def shuffle_xor(self, number: V, distance: int) -> V:
        """The float of the lane whose index in the warp differs in the bit `distance`."""
        ...

    def prefix_sum(self, word: V) -> V:
        """The sum of the integers of the lanes of the warp before this one."""
        ...

    def multiply_high(self, a: V, b: V) -> V:
        """The upper 32 of the 64 bits of a product of integers without signs."""
        ...

    def opaque(self, word: V) -> V:
        """The same integer, of which the compiler does not know that it is."""
        ...

    def sync(self) -> None:
        """Barrier: wait for all lanes of the CTA."""
        ...

    def sync_warp(self) -> None:
        """Barrier: wait for all lanes of the warp."""
        ...

    def load(self, address: V) -> V:
        """One word of device memory; it is in flight from here on."""
        ...

    def load_two(self, address: V) -> list[V]:
        """Two words of device memory."""
        ...

    def load_four(self, address: V) -> list[V]:
        """Four words of device memory."""
        ...

    def load_bfloat16(self, address: V) -> V:
        """As a float32, of which it is the upper half."""
        ...

    def stream(self, address: V) -> list[V]:
        """Four words of device memory that are read once."""
        ...

    def stream_two(self, address: V) -> list[V]:
        """Two words of device memory that are read once."""
        ...

    def copy_async(self, to: V, address: V, when: V) -> None:
        """Begin to copy 16 bytes of device memory that are read once into shared memory, or zeros."""
        ...

    def commit_copies(self) -> None:
        """End a group of a lane's copies."""
        ...

    def wait_for_copies(self, groups: int) -> None:
        """Until all of the lane's copies have arrived but those of the last groups; for the lane itself."""
        ...

    def open_stream(self) -> None:
        """Before the first `stream` or `copy`, outside any branch or loop."""
        ...

    def store(self, address: V, word: V, when: V) -> None:
        """One word into device memory."""
        ...

    def store_bfloat16(self, address: V, number: V, when: V) -> None:
        """A float that is a bfloat16."""
        ...

    def read(self, address: V) -> V:
        """One word of shared memory."""
        ...

    def read_or_zero(self, address: V, when: V) -> V:
        """One word of shared memory, or zero."""
        ...

    def read_four_or_zeros(self, address: V, when: V) -> list[V]:
        """Four words of shared memory, or zeros."""
        ...

    def read_two(self, address: V) -> list[V]:
        """Two words of shared memory."""
        ...

    def read_four(self, address: V) -> list[V]:
        """Four words of shared memory."""
        ...

    def write(self, address: V, words: Sequence[V], when: V | None = None) -> None:
        """One, two or four words into shared memory."""
        ...

    def append(self, address: V, word: V, mask: V, bit: int) -> V:
        """Write a word into shared memory where the mask has the bit; the address behind what was written."""
        ...

    def read_address(self, address: V) -> V:
        """An address that stands in shared memory."""
        ...

    def write_address(self, address: V, value: V, when: V) -> None:
        """Leave an address in shared memory."""
        ...

    def send(self, address: V, word: V, flag: V, when: V) -> None:
        """A word and a flag, in one store of 8 bytes, for whoever polls for the flag."""
        ...

    def poll(self, pairs: Sequence[Mailbox[V]], singles: Sequence[Mailbox[V]], flag: V) -> list[V]:
        """The words that were sent to the addresses, two at each of `pairs`, once every one of them has the flag.

        A mailbox comes with a condition: where it does not hold, nothing is waited for and the words are zero.
        """
        ...

    def cond(
        self,
        condition: V,
        kinds: str,
        then: Callable[[], Sequence[V]],
        other: Callable[[], Sequence[V]],
    ) -> list[V]:
        """What one of two bodies gives, whichever the lanes run: an "i"nteger or a "f"loat for each letter."""
        ...

    def when(self, condition: V, body: Callable[[], Any]) -> None:
        """Run the body in the lanes where the condition holds."""
        ...

    def for_loop(self, iterations: V, carry: Sequence[V], body: Callable[[V, list[V]], Sequence[V]]) -> list[V]:
        """`carry = body(i, carry)` for i below `iterations`."""
        ...

    def do_while(self, body: Callable[[], V]) -> None:
        """Run the body, and again while what it gives holds."""
        ...
