"""Every operation of a decode step against its reference, on what the trained demo model computes.

Each is asked for what the model gives it, for all, none and one of the channels kept, and for infinities and NaNs in
each of its inputs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_attention import decode_attention
from kernels_pallas.kept import Kept
from kernels_pallas.select import select, select_attention, select_gated, select_norm
from kernels_pallas.select.reference import merge_reference
from kernels_pallas.sparse_product import Config, sparse_product
from kernels_pallas.weight import Weight
from wisparse_jax.models.config import INPUT_GROUPS
from wisparse_jax.testing import jit_as_written, listed_channels, relative_error

CONFIG = Config(rows=64, lists=2, block_rows=16, block_columns=32, warps=4)
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3, "int8": 1e-3, "int4": 1e-3}
XLA: dict[str, Any] = {"implementation": "xla"}
EPS = 1e-5

every_block = pytest.mark.parametrize("index", [0, 7])
every_dtype = pytest.mark.parametrize("weights", ["float32", "bfloat16"])


def thresholds(real, group):
    return jnp.stack([real.thresholds[name] for name in INPUT_GROUPS[group]])


def sums(real, *names):
    """The dense products of layers, as one part."""
    return [
        jnp.matmul(real.inputs[n], real.params[n]["kernel"], preferred_element_type=jnp.float32)[None] for n in names
    ]


def levels(limits):
    """Thresholds that keep what they keep, all, none, and one."""
    none = jnp.full_like(limits, jnp.inf)
    return [limits, jnp.zeros_like(none), none, none.at[:, 37].set(0)]


def cases_of(inputs, which):
    """The inputs, whose last are thresholds, at all levels of these, and spoiled."""
    return [*((*inputs[:-1], limits) for limits in levels(inputs[-1])), *spoiled(inputs, which)]


def spoiled(inputs, which):
    """The inputs with something in one of them that is not a number or not finite."""
    for i in which:
        for number in (jnp.inf, -jnp.inf, jnp.nan):
            place = (0,) * (inputs[i].ndim - 1) + (5,)
            yield *inputs[:i], inputs[i].at[place].set(number), *inputs[i + 1 :]


def comparable(out: Any) -> list[np.ndarray]:
    """The arrays; of lists, what they hold."""
    arrays = []
    for one in jax.tree.leaves(out, is_leaf=lambda one: isinstance(one, Kept)):
        arrays += (
            listed_channels(one, one.chunks * one.rows) if isinstance(one, Kept) else [np.asarray(one, np.float32)]
        )
    return arrays


def assert_same(operation, cases, triton, weights):
    """Operations take their keywords first, so that one compilation serves all cases."""
    kernel, reference = (jit_as_written(functools.partial(operation, how)) for how in (triton, XLA))
    for case in cases:
        for found, want in zip(comparable(kernel(*case)), comparable(reference(*case)), strict=True):
            assert relative_error(found, want) < TOLERANCE[weights]


@every_block
@every_dtype
@pytest.mark.parametrize("group", ["attn_in", "mlp_in"])
def test_norm(triton, real_block, group, weights, index):
    real = real_block(weights, index)
    weight = real.params["attn_norm" if group == "attn_in" else "mlp_norm"]
    parts = None if group == "attn_in" else sums(real, "o")[0]

    def operation(how, x, weight, limits):
        return select_norm(x, parts, None, weight, EPS, limits, CONFIG.rows, **how)

    assert_same(operation, cases_of((real.x, weight, thresholds(real, group)), (0, 1)), triton, weights)


@every_block
@every_dtype
def test_gate(triton, real_block, weights, index):
    real = real_block(weights, index)

    def operation(how, gate, up, limits):
        return select_gated(gate, up, None, None, limits, CONFIG.rows, real.x.dtype, **how)

    inputs = *sums(real, "gate", "up"), thresholds(real, "mlp_mid")
    assert_same(operation, cases_of(inputs, (0, 1)), triton, weights)


@every_block
@every_dtype
def test_attention(triton, real_block, weights, index):
    """Attention and the cache with the new token; then the selection from the splits of it."""
    real = real_block(weights, index)
    attention: Any = decode_attention
    slot, start = jnp.int32(real.cache.keys.shape[1] - 1), jnp.array([0, 50, 150])

    def splits(how, *inputs):
        place = real.cos, real.sin, *inputs[3:], slot, start
        return attention(inputs[:3], (None, None, None), None, *place, None, EPS, **how)

    def whole(how, *inputs):
        partial, highest, total, keys, values = splits(how, *inputs)
        return merge_reference(partial, highest, total, jnp.float32), keys, values

    def selection(how, partial, highest, total, limits):
        return select_attention(partial, highest, total, limits, CONFIG.rows, real.x.dtype, **how)

    inputs = *sums(real, "q", "k", "v"), *real.cache
    assert_same(whole, [inputs, *spoiled(inputs, range(5))], triton, weights)
    inputs = *splits(triton, *inputs)[:3], thresholds(real, "attn_out")
    assert inputs[0].shape[1] > 1
    assert_same(selection, cases_of(inputs, (0, 2)), triton, weights)


@every_block
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("group", INPUT_GROUPS)
def test_product(triton, real_block, group, weights, index):
    real, layers = real_block(weights, index), INPUT_GROUPS[group]
    stored = [Weight.of(real.params[n]) for n in layers]

    def operation(how, *kept):
        return [parts.sum(0) for parts in sparse_product(Kept(*kept), stored, CONFIG, **how)]

    x = real.inputs[layers[0]]
    cases = [select(x, limits, CONFIG.rows, **XLA) for limits in levels(thresholds(real, group))]
    assert_same(operation, [*cases, *spoiled(cases[0], (2,))], triton, weights)
