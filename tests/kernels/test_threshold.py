"""A channel whose |x| is its threshold is kept, and one a bit below it is not, on every path that chooses channels."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import sparse_linear
from kernels_pallas.decode_step import decode_step
from kernels_pallas.fused_block import FusedConfig
from kernels_pallas.implementation import mosaic_problem
from kernels_pallas.select import select, select_attention, select_gated, select_norm
from kernels_pallas.sparse_linear.reference import keep_mask
from wisparse_jax.models.rules import ChannelRule
from wisparse_jax.testing import listed_channels, normal

SIZE, ROWS = 48, 16
XLA: dict[str, Any] = {"implementation": "xla"}


@pytest.fixture(params=["xla", "triton"])
def how(request, triton):
    return XLA if request.param == "xla" else triton


def above(limits):
    """The next numbers of float32."""
    return jnp.asarray(np.nextafter(np.asarray(limits, np.float32), np.float32(np.inf)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_product(how, dtype):
    x = normal(0, 1, SIZE, dtype=dtype)
    limits = jnp.abs(x[0].astype(jnp.float32))
    weight = jnp.eye(SIZE, dtype=dtype)
    np.testing.assert_array_equal(sparse_linear(x, weight, limits, **how), x)
    assert not np.asarray(sparse_linear(x, weight, above(limits), **how).astype(jnp.float32)).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_rule_of_a_layer_and_what_is_counted(dtype):
    """The rule is what a model on XLA runs, the mask what evaluations count as realised."""
    from kernels_pallas.weight import as_weight

    x = normal(1, 2, 3, SIZE, dtype=dtype)
    limits = jnp.abs(x[0, 0].astype(jnp.float32))
    weight = as_weight(jnp.eye(SIZE, dtype=dtype))
    np.testing.assert_array_equal(ChannelRule(limits).product(x, weight)[0, 0], x[0, 0])
    assert not np.asarray(ChannelRule(above(limits)).product(x, weight)[0, 0].astype(jnp.float32)).any()
    assert np.asarray(keep_mask(x, limits)[0, 0]).all() and not np.asarray(keep_mask(x, above(limits))[0, 0]).any()


def gated(limits, how):
    return select_gated(normal(2, 1, 1, SIZE), normal(3, 1, 1, SIZE), None, None, limits, ROWS, jnp.float32, **how)


def normed(limits, how):
    return select_norm(normal(4, 1, SIZE), None, None, normal(5, SIZE), 1e-5, limits, ROWS, **how)[1]


def attended(limits, how):
    one = jnp.ones((1, 1, 3))
    return select_attention(normal(6, 1, 1, SIZE), one, one, limits, ROWS, jnp.float32, **how)


def plain(limits, how):
    return select(normal(7, 1, SIZE), limits, ROWS, **how)


@pytest.mark.parametrize("lists", [plain, normed, gated, attended])
def test_a_list_of_channels(how, lists):
    _, values = listed_channels(lists(jnp.zeros((1, SIZE)), how), SIZE)
    limits = jnp.abs(jnp.asarray(values, jnp.float32)).reshape(1, SIZE)
    kept, _ = listed_channels(lists(limits, how), SIZE)
    assert np.asarray(kept).all()
    kept, _ = listed_channels(lists(above(limits), how), SIZE)
    assert not np.asarray(kept).any()


def test_the_fused_block():
    """Its first lists, where every value is ±1 exactly: a stream of ones of either sign is its own norm."""
    hidden, inner, dim, heads = 128, 352, 32, 4
    rng = np.random.default_rng(0)

    def weight(size_in, size_out):
        return {"kernel": jnp.asarray((rng.standard_normal((size_in, size_out)) / size_in**0.5).astype(jnp.bfloat16))}

    sizes = {"q": (hidden, 128), "k": (hidden, 64), "v": (hidden, 64), "o": (128, hidden)}
    sizes |= {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    block = {name: weight(*size) for name, size in sizes.items()}
    block |= {name: jnp.ones(hidden, jnp.bfloat16) for name in ("attn_norm", "mlp_norm")}
    empty = jnp.zeros((1, 8, heads // 2, dim), jnp.bfloat16)
    cache = [(empty, empty)]
    x = jnp.asarray(rng.choice([-1.0, 1.0], (1, hidden)).astype(jnp.bfloat16))
    angles = jnp.ones((1, dim // 2)), jnp.zeros((1, dim // 2))
    sizes_in = {"attn_out": (1, 128), "mlp_in": (2, hidden), "mlp_mid": (1, inner)}
    limits = {group: jnp.zeros(shape) for group, shape in sizes_in.items()}
    config = FusedConfig(
        ctas=12, threads=128, splits_in=2, splits_out=2, splits_down=3, attention_splits=3, depth=2
    )  # fmt: skip
    ways = [XLA, {"implementation": "mosaic", "interpret": mosaic_problem() is not None, "fused_config": config}]
    for one, expected in ((jnp.ones((3, hidden)), hidden), (above(jnp.ones((3, hidden))), 0)):
        own = [limits | {"attn_in": one}]
        for way in ways:
            place = jnp.int32(3), jnp.zeros(1, jnp.int32), [None], 1e-5
            counts = decode_step(x, [block], cache, own, angles, *place, **way).counts
            assert np.asarray(counts[0]["attn_in"]).sum(1).tolist() == [expected] * 3
