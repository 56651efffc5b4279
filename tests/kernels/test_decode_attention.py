from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_attention import HeadNorms, decode_attention, splits_for
from kernels_pallas.select.reference import merge_reference
from wisparse_jax.testing import jit_as_written, normal, relative_error


def outputs(splits_and_cache):
    """Attention over all slots, and the caches."""
    partial, highest, total, *cache = splits_and_cache
    return [merge_reference(partial, highest, total, jnp.float32), *(c.astype(jnp.float32) for c in cache)]


def problem(batch, kv_heads, group, dim, slots, slot, dtype, biased=False, normed=False, window=None) -> Any:
    features = (kv_heads * group * dim, kv_heads * dim, kv_heads * dim)
    products = tuple(normal(i, 3, batch, n) for i, n in enumerate(features))
    biases = tuple(normal(3 + i, n).astype(dtype) if biased else None for i, n in enumerate(features))
    norms = HeadNorms(normal(6, dim).astype(dtype), normal(7, dim).astype(dtype)) if normed else None
    angles = normal(8, batch, dim // 2)
    cache = [normal(9 + i, batch, slots, kv_heads, dim).astype(dtype) for i in range(2)]
    start = jnp.arange(batch, dtype=jnp.int32) % (slot + 1)
    return (products, biases, norms, jnp.cos(angles), jnp.sin(angles), *cache, jnp.int32(slot), start, window)


CASES = {
    "plain": {},
    "first token": {"slot": 0},
    "full cache": {"slot": 255},
    "window": {"window": 20},
    "tiny window": {"window": 1},
    "bias": {"biased": True},
    "norms": {"normed": True},
    "group of seven": {"group": 7},
    "no groups": {"group": 1, "kv_heads": 3},
    "odd head": {"dim": 48},
    "batch": {"batch": 5, "slot": 3},
}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((n, jnp.float32) for n in CASES), ("plain", jnp.bfloat16), ("norms", jnp.bfloat16)]
)
def test_attention_and_cache_are_the_references(triton, name, dtype):
    sizes = {"batch": 2, "kv_heads": 2, "group": 4, "dim": 32, "slots": 256, "slot": 150} | CASES[name]
    arguments = problem(**sizes, dtype=dtype)
    attention: Any = decode_attention

    def run(how):
        return jit_as_written(lambda *a: attention(*a, arguments[-1], **how))(*arguments[:-1])

    found, expected = run(triton), run({"implementation": "xla"})
    assert found[0].shape[1] == splits_for(sizes["batch"], sizes["kv_heads"], 256)
    found, expected = outputs(found), outputs(expected)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < (1e-5 if dtype == jnp.float32 else 1e-3)
    # And by the element: one token among the many of a cache hardly counts in a norm.
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    assert np.abs(found[0] - expected[0]).max() <= tolerance * np.abs(expected[0]).max()
    for one, other in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * 4)


def test_it_is_softmax_attention():
    """The reference itself, against attention written out."""
    arguments = problem(2, 2, 3, 16, 32, 20, jnp.float32)
    products, _, _, cos, sin, keys, values, _, start, _ = arguments
    partial, highest, total, new_keys, new_values = decode_attention(*arguments, implementation="xla")
    out = merge_reference(partial, highest, total, jnp.float32).reshape(2, 2, 3, 16)

    def rotated(x, row):
        a, b = x[:8], x[8:]
        return np.concatenate([a * cos[row] - b * sin[row], b * cos[row] + a * sin[row]])

    sums = [np.asarray(p.sum(0)) for p in products]
    for row in range(2):
        for head in range(2):
            k = rotated(sums[1][row, head * 16 : head * 16 + 16], row)
            v = sums[2][row, head * 16 : head * 16 + 16]
            np.testing.assert_allclose(new_keys[row, 20, head], k, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(new_values[row, 20, head], v, rtol=1e-5, atol=1e-6)
            seen = slice(int(start[row]), 20)
            all_keys = np.concatenate([keys[row, seen, head], k[None]])
            all_values = np.concatenate([values[row, seen, head], v[None]])
            for g in range(3):
                at = (head * 3 + g) * 16
                scores = all_keys @ rotated(sums[0][row, at : at + 16], row) / 4
                weights = np.exp(scores - scores.max())
                expected = weights / weights.sum() @ all_values
                np.testing.assert_allclose(out[row, head, g], expected, rtol=1e-4, atol=1e-5)


def test_splits_fill_the_device_but_stay_worth_a_program():
    assert splits_for(1, 8, 63) == 1 and splits_for(1, 8, 1024) == 16
    assert splits_for(16, 8, 4096) == 1 and splits_for(1, 2, 131_072) == 64
