"""Lane code in NumPy, with a race checker: what would be a race on a GPU is an error.

The simulation runs all lanes in lockstep, where a missing barrier does no harm. Here it keeps an account of who wrote
and who read each word of shared memory since the last barrier of the CTA, and of the warp. What warps overwrite of
each other is left out: between phases they are held apart by flags, which are no barriers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kernels_pallas.lanes.numpy_value import Value
from kernels_pallas.lanes.simulated import WARP, Simulated

NOBODY = -1
RACE = "two lanes use a word of shared memory with no barrier between"


class RaceChecker(Simulated):
    """The machine that refuses to read a word of shared memory which another warp, or another lane of the warp, has
    written since the last barrier of the CTA, or of the warp."""

    def __init__(self, ctas: int, threads: int, arrays: Sequence[np.ndarray], shared_bytes: int):
        super().__init__(ctas, threads, arrays, shared_bytes)
        self.by_warp, self.by_lane, self.read_by = (np.full(self._shared.shape, NOBODY) for _ in range(3))

    def sync(self) -> None:
        on = self._on.reshape(-1, self.threads)
        assert (on.all(1) | ~on.any(1)).all(), "a barrier that some lanes of a CTA do not come to"
        for known in (self.by_warp, self.by_lane, self.read_by):
            known[on.any(1)] = NOBODY

    def sync_warp(self) -> None:
        for cta, warp in {*zip(self._cta[self._on], self._thread[self._on] // WARP, strict=True)}:
            for known in (self.by_lane[cta], self.read_by[cta]):
                known[known // WARP == warp] = NOBODY

    def _index(self, address: Value, words: int, on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cta, at = super()._index(address, words, on)
        lanes = np.flatnonzero(on)
        for k in range(words):
            where = cta[lanes], at[lanes] + k
            for known, own in ((self.by_warp, self._thread // WARP), (self.by_lane, self._thread)):
                if ((known[where] != NOBODY) & (known[where] != own[lanes])).any():
                    raise RuntimeError(f"{RACE}: read behind a write")
            self.read_by[where] = self._thread[lanes]
        return cta, at

    def write(self, address: Value, words: Sequence[Value], when: Value | None = None) -> None:
        on = self._on if when is None else self._on & when.value
        cta, at = Simulated._index(self, address, len(words), on)
        for k, word in enumerate(words):
            where, known = (cta[on], at[on] + k), self.read_by[cta[on], at[on] + k]
            if ((known // WARP == self._thread[on] // WARP) & (known != self._thread[on])).any():
                raise RuntimeError(f"{RACE}: written behind a read")
            bits = self.as_bits(word) if word.value.dtype == np.float32 else word
            self._shared[where] = np.broadcast_to(bits.value, self.lanes)[on].astype(np.uint32)
            self.by_warp[where], self.by_lane[where] = self._thread[on] // WARP, self._thread[on]
