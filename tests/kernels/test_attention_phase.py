"""The fused block's attention by itself, simulated: it reads q, k and v from mailboxes, and its own are read."""

import ml_dtypes
import numpy as np
import pytest

from kernels_pallas.fused_block import FusedConfig, FusedShape
from kernels_pallas.fused_block.api import UNSEEN
from kernels_pallas.fused_block.kernel import Kernel
from kernels_pallas.fused_block.memory_layout import memory_layout
from kernels_pallas.fused_block.tiling import block_arrays, products
from kernels_pallas.lanes.numpy_value import Value
from kernels_pallas.lanes.simulated import Simulated

CONFIG = FusedConfig(ctas=12, threads=128, splits_in=2, splits_out=2, splits_down=3, attention_splits=3, depth=1)
FLAG, EPS = 5, 1e-5
CASES = {
    "plain": {},
    "first token": {"slot": 0, "start": 0},
    "many slots": {"slot": 300, "start": 0},
    "window": {"slot": 120, "window": 70},
    "biases": {"biased": True},
    "norms of heads": {"qk_norm": True},
    "wide heads": {"dim": 128, "group": 1},
    "many queries": {"dim": 64, "group": 4, "kv_heads": 1},
}


def bfloat16(a):
    return np.asarray(a, ml_dtypes.bfloat16)


def rounded(a):
    return bfloat16(a).astype(np.float64)


class Phase:
    """Random inputs, the phase run on them, and the same written out in float64."""

    def __init__(self, dim=32, group=2, kv_heads=2, slot=40, start=3, window=None, biased=False, qk_norm=False):
        biases = ("q", "k", "v") if biased else ()
        self.shape = FusedShape(128, 352, group * kv_heads, kv_heads, dim, "bfloat16", EPS, biases, qk_norm)
        rng = np.random.default_rng(0)
        self.slot, self.first = slot, max(start, 0 if window is None else slot - window + 1)
        sizes, splits = self.shape.sizes_in, CONFIG.splits_in
        self.angle = rng.uniform(0, 6, dim // 2)
        self.parts = rng.standard_normal((splits, sum(sizes))).astype(np.float32)
        self.bias = bfloat16(rng.standard_normal(sum(sizes)) if biased else np.zeros(sum(sizes)))
        self.gains = [bfloat16(1 + 0.2 * rng.standard_normal(dim)) for _ in range(2)]
        self.cache = [bfloat16(rng.standard_normal((slot + 2, kv_heads, dim))) for _ in range(2)]
        layout = memory_layout(self.shape, CONFIG)
        exchange = np.zeros((layout.mailboxes, 2), np.int32)
        begin = layout.exchange["qkv"]
        exchange[begin : begin + self.parts.size] = [[bits, FLAG] for bits in self.parts.reshape(-1).view(np.int32)]
        arrays = {f"{name}_0": np.zeros(4, np.int32) for name in block_arrays(self.shape)}
        arrays |= {"keys_0": self.cache[0], "values_0": self.cache[1], "exchange": exchange}
        if qk_norm:
            arrays |= {"q_norm_0": self.gains[0], "k_norm_0": self.gains[1]}
        if biased:
            own = np.split(self.bias, np.cumsum(sizes)[:-1])
            arrays |= {f"bias_{name}_0": array for name, array in zip("qkv", own, strict=True)}
        seen = UNSEEN if window is None else window
        arrays |= {name: np.array([n], np.int32) for name, n in (("slot", slot), ("start", start), ("windows", seen))}
        arrays |= {"cos": np.cos(self.angle).astype(np.float32), "sin": np.sin(self.angle).astype(np.float32)}
        self.arrays = arrays
        self.machine = Simulated(CONFIG.ctas, CONFIG.threads, list(arrays.values()), layout.shared)
        at = {name: self.machine.device(i) for i, name in enumerate(arrays)}
        self.kernel = Kernel(self.machine, self.shape, CONFIG, 1, at, self.machine.shared(0))
        self.kernel.note_addresses()
        self.kernel.go_to(
            self.machine.integer(1), self.machine.integer(FLAG)
        )  # the second phase, before whose product it is
        self.kernel.begin_phase()
        self.machine.when(self.kernel.cta < kv_heads * CONFIG.attention_splits, self.kernel.attend)

    def array(self, name):
        return self.machine.array(list(self.arrays).index(name), self.arrays[name])

    def merged(self):
        """What a CTA that reads the mailboxes makes of them, by channel."""
        channel = np.minimum(np.arange(self.machine.lanes), self.shape.attended - 1)
        return self.kernel.merged(Value(channel)).value[: self.shape.attended]

    def written_out(self):
        """The new key and value, and attention at every channel."""
        shape, dim = self.shape, self.shape.head_dim
        y = rounded(rounded(self.parts.astype(np.float64).sum(0)) + self.bias.astype(np.float64))
        query, key, value = (part.reshape(-1, dim) for part in np.split(y, np.cumsum(shape.sizes_in)[:-1]))
        if shape.qk_norm:
            query, key = (
                rounded(rounded(a / np.sqrt(np.mean(a * a, -1, keepdims=True) + EPS)) * gain.astype(np.float64))
                for a, gain in zip((query, key), self.gains, strict=True)
            )
        cos, sin = np.cos(self.angle), np.sin(self.angle)

        def turned(a):
            one, two = np.split(a, 2, axis=-1)
            return rounded(np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1))

        query, key = turned(query), turned(key)
        keys, values = (a.astype(np.float64) for a in self.cache)
        keys[self.slot], values[self.slot] = key, value
        seen = slice(self.first, self.slot + 1)
        grouped = query.reshape(shape.kv_heads, -1, dim)
        scores = np.einsum("kgd,skd->kgs", grouped, keys[seen]) * dim**-0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return key, value, np.einsum("kgs,skd->kgd", weights, values[seen]).reshape(-1)


@pytest.mark.parametrize("case", CASES)
def test_it_is_attention_written_out(case):
    phase = Phase(**CASES[case])
    key, value, attended = phase.written_out()
    # A product of float32 may be rounded to the other bfloat16.
    for name, expected in (("keys_0", key), ("values_0", value)):
        found = phase.array(name).astype(np.float64)
        np.testing.assert_allclose(found[phase.slot], expected, atol=1e-2 * np.abs(expected).max())
        others = np.arange(len(found)) != phase.slot
        np.testing.assert_array_equal(found[others], phase.arrays[name].astype(np.float64)[others])
    found = phase.merged().astype(np.float64)
    assert np.abs(found - attended).max() < 5e-3 * np.abs(attended).max()
    assert (found == rounded(found)).all()


def test_the_layout_of_the_phase_is_that_of_the_products():
    """The mailboxes of q, k and v lie one after the other, split by split, as this file wrote them."""
    phase = Phase()
    assert products(phase.shape, CONFIG)["attn_in"].splits == len(phase.parts)
    assert (
        memory_layout(phase.shape, CONFIG).exchange["attended"]
        >= memory_layout(phase.shape, CONFIG).exchange["qkv"] + phase.parts.size
    )
