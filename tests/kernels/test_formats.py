"""Each kind of weights by itself: what the tensor cores get is the numbers that the bytes stand for."""

import ml_dtypes
import numpy as np
import pytest

from kernels_pallas.formats import FORMATS
from kernels_pallas.lanes.numpy_value import Value
from kernels_pallas.lanes.simulated import WARP, Simulated

BITS = {"bfloat16": 16, "int8": 8, "int4": 4}


def numbers_of(kind, words):
    """The columns of 16 bytes `[..., 4]` words of a row, written out from their bytes."""
    data = np.ascontiguousarray(words.astype("<u4")).view(np.uint8)
    if kind == "bfloat16":
        return data.view(ml_dtypes.bfloat16).astype(np.float64)
    if kind == "int8":
        return data.view(np.int8).astype(np.float64)
    return np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1) - 8.0


@pytest.fixture(scope="module")
def words():
    """Four rows of four words for each lane of a warp; no exponent of a bfloat16 among them is that of infinity."""
    return np.random.default_rng(0).integers(0, 2**32, (WARP, 4, 4)) & ~0x40004000


@pytest.mark.parametrize("kind", BITS)
def test_pairs_are_the_numbers_of_the_bytes(kind, words):
    """Rows 0 and 1 of column 2i in the first operand, of column 2i + 1 in the second, then rows 2 and 3."""
    m, made = Simulated(1, WARP, [], 16), FORMATS[kind]
    rows = [[Value(words[:, row, k].astype(np.int64)) for k in range(4)] for row in range(4)]
    expected = numbers_of(kind, words)  # [lanes, rows, columns]
    places, half = [], np.float16 if made.multiplied == "f16" else ml_dtypes.bfloat16
    for i, operands in made.pairs(m, rows, made.constants(m)):
        places.append(i)
        for k, operand in enumerate(operands):
            found = np.asarray(operand.value).astype("<u4").reshape(-1, 1).view(np.uint16).view(half).astype(np.float64)
            surplus = 0.0 if made.surplus is None else made.surplus[k % 2]
            np.testing.assert_array_equal(found - surplus, expected[:, 2 * (k // 2) : 2 * (k // 2) + 2, 2 * i + k % 2])
    assert sorted(places) == list(range(64 // BITS[kind]))
    quarters = np.asarray(places) // 4
    assert kind == "bfloat16" or (np.diff(quarters) != 0).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_one_number_of_a_word(kind, words):
    m, word = Simulated(1, WARP, [], 16), Value(words[:, 0, 0].astype(np.int64))
    for place in range(32 // BITS[kind]):
        found = FORMATS[kind].number(m, word, Value(np.int64(BITS[kind] * place)))
        np.testing.assert_array_equal(found.value, numbers_of(kind, words[:, 0])[:, place])
