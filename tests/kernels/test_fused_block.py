"""The fused blocks, compiled where there is a Hopper GPU and simulated elsewhere, against blocks written out."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

from kernels_pallas.decode_step import decode_step
from kernels_pallas.formats import FORMATS
from kernels_pallas.formats.base import GROUP
from kernels_pallas.fused_block import FusedConfig, FusedShape, block_shape, first_exchange, fused_blocks, launch
from kernels_pallas.fused_block.config import heuristic, problem
from kernels_pallas.fused_block.memory_layout import memory_layout
from kernels_pallas.fused_block.tasks import tasks
from kernels_pallas.fused_block.tiling import LINE, PHASES, SET, Task, products, sets
from kernels_pallas.implementation import mosaic_problem
from kernels_pallas.lanes.race_checker import RACE, RaceChecker
from wisparse_jax.models.config import INPUT_GROUPS
from wisparse_jax.testing import jit_as_written, relative_error

CONFIG = FusedConfig(ctas=12, threads=128, splits_in=2, splits_out=2, splits_down=3, attention_splits=3, depth=2)
# Tiles of int4 have 128 columns or more, of gate and of up.
NARROW = dataclasses.replace(CONFIG, threads=256, unit=4)
# Tiles of two sets of columns, each with scales and lists of its own.
WIDE = FusedConfig(ctas=5, threads=512, splits_in=1, splits_out=4, splits_down=4, attention_splits=2, depth=1)
HOW: dict[str, Any] = {"interpret": mosaic_problem() is not None}
EPS = 1e-5


def arguments(
    hidden=128, inner=352, dim=32, group=2, kv_heads=2, depth=1, weights="bfloat16", biased=(), qk_norm=False,
    slot=40, start=3, window=None, seed=0,
) -> Any:  # fmt: skip
    """What `fused_blocks` takes, half of the channels kept, by thresholds of 0 and of infinity: none is close."""
    # NumPy's numbers: JAX's would compile for every shape.
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype: Any = jnp.bfloat16, scale=1.0, middle=0.0):
        return jnp.asarray((middle + rng.standard_normal(shape) * scale).astype(dtype))

    attended, kv = group * kv_heads * dim, kv_heads * dim
    sizes = {"q": (hidden, attended), "k": (hidden, kv), "v": (hidden, kv), "o": (attended, hidden)}
    sizes |= {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    groups = {"attn_in": (3, hidden), "attn_out": (1, attended), "mlp_in": (2, hidden), "mlp_mid": (1, inner)}
    blocks, cache, thresholds = [], [], []
    for _ in range(depth):
        block: dict[str, Any] = {}
        for name, (size_in, size_out) in sizes.items():
            if weights == "int8":
                kernel = jnp.asarray(rng.integers(-128, 128, (size_in, size_out)).astype(np.int8))
                scale = jnp.asarray((rng.uniform(0.5, 1.5, size_out) / 74 / size_in**0.5).astype(np.float32))
                block[name] = {"kernel": kernel, "scale": scale}
            elif FORMATS[weights].group is not None:
                planes = [rng.integers(0, 256, (size_in, size_out * n // 8)) for n in FORMATS[weights].planes]
                planes = tuple(jnp.asarray(plane.astype(np.uint8)) for plane in planes)
                kernel = planes[0] if weights == "int4" else planes
                # Of either sign, and of so few bits that a value times its scale is a float16: else some
                # of the sums are rounded to the other bfloat16.
                scale = rng.integers(4, 8, (-(-size_out // GROUP), size_in)) * rng.choice([-1, 1], size_in)
                scale = scale * 2.0 ** np.round(-5 - np.log2(size_in) / 2)
                block[name] = {"kernel": kernel, "scale": jnp.asarray(scale.astype(jnp.bfloat16))}
            else:
                block[name] = {"kernel": normal(size_in, size_out, dtype=weights, scale=size_in**-0.5)}
            if name in biased:
                block[name]["bias"] = normal(size_out)
        block |= {name: normal(hidden, scale=0.2, middle=1.0) for name in ("attn_norm", "mlp_norm")}
        if qk_norm:
            block |= {name: normal(dim, scale=0.2, middle=1.0) for name in ("q_norm", "k_norm")}
        blocks.append(block)
        cache.append((normal(1, slot + 5, kv_heads, dim), normal(1, slot + 5, kv_heads, dim)))
        # Of planes all, some or one are read of a channel that is kept.
        planes = np.arange(len(FORMATS[weights].planes))[None, :, None]
        share = 1 - (planes + 1) / (planes.size + 1)
        keeps = {g: np.where(rng.random((n, 1, size)) < share, 0.0, np.inf) for g, (n, size) in groups.items()}
        keeps = {g: thresholds.reshape(-1, thresholds.shape[2]) for g, thresholds in keeps.items()}
        thresholds.append({g: jnp.asarray(t.astype(np.float32)) for g, t in keeps.items()})
    angle = rng.uniform(0, 6, (1, dim // 2))
    angles = tuple(jnp.asarray(f(angle).astype(np.float32)) for f in (np.cos, np.sin))
    place = jnp.int32(slot), jnp.full(1, start, jnp.int32)
    return normal(1, hidden), blocks, cache, thresholds, angles, *place, [window] * depth, EPS


def changed(inputs: Any, **values: Any) -> Any:
    """The same with other values."""
    names = ["x", "blocks", "cache", "thresholds", "angles", "slot", "start", "windows", "eps"]
    return tuple((dict(zip(names, inputs, strict=True)) | values)[name] for name in names)


def run(inputs: Any, config=None, flag=2, exchange=None) -> Any:
    shape = block_shape(inputs[1][0], inputs[2][0][0].shape[3], EPS)
    config = config or (CONFIG if shape.format.group is None else NARROW)
    exchange = first_exchange(shape, config) if exchange is None else exchange
    return fused_blocks(*inputs, exchange=exchange, flag=flag, config=config, **HOW)


def rounded(a):
    return np.asarray(np.asarray(a), jnp.bfloat16).astype(np.float64)


def dequantised(layer):
    """Of each plane what it adds to the weight, in float64, written out from its bytes."""
    if isinstance(layer["kernel"], tuple):
        out, read, columns = [], 0, 2 * layer["kernel"][0].shape[1]
        for plane in map(np.asarray, layer["kernel"]):
            bits = 8 * plane.shape[1] // columns
            read += bits
            step = 2.0 ** (4 - read)
            fields = np.stack([plane >> n & (2**bits - 1) for n in range(0, 8, bits)], axis=-1).reshape(len(plane), -1)
            group = np.arange(fields.shape[1]) // GROUP
            out.append((fields - (2**bits - 1) / 2) * step * np.asarray(layer["scale"], np.float64).T[:, group])
        return out
    return [whole(layer)]


def whole(layer):
    """A weight without planes."""
    kernel = np.asarray(layer["kernel"])
    if kernel.dtype == np.uint8:
        numbers = np.zeros((len(kernel), 2 * kernel.shape[1]))
        numbers[:, ::2], numbers[:, 1::2] = kernel % 16 - 8.0, kernel // 16 - 8.0
        group = np.arange(numbers.shape[1]) // GROUP
        return numbers * np.asarray(layer["scale"], np.float64).T[:, group]
    return kernel.astype(np.float64) * np.asarray(layer.get("scale", 1.0), np.float64)


def written_out(x, blocks, cache, thresholds, angles, slot, start, windows, eps):
    """The blocks in float64, rounded to bfloat16 where the model rounds; the stream, the caches, and the counts."""
    cos, sin = (np.asarray(a, np.float64)[0] for a in angles)
    slot, stream, caches, counts = int(slot), rounded(x)[0], [], []

    def products(b, group, value, *names):
        keeps = np.abs(value) >= np.asarray(thresholds[b][group])
        counts[b][group] = keeps.sum(1).tolist()
        out = []
        for keep, name in zip(keeps.reshape(len(names), -1, keeps.shape[1]), names, strict=True):
            layer = blocks[b][name]
            # What is read of the weight: an infinite value times it is not the sum of infinities of either sign.
            read = sum(np.where(own[:, None], plane, 0) for own, plane in zip(keep, dequantised(layer), strict=True))
            y = rounded(np.where(keep[0], value, 0) @ read)
            out.append(rounded(y + rounded(layer["bias"])) if "bias" in layer else y)
        return out

    def normed(value, weight):
        return rounded(rounded(value / np.sqrt(np.mean(value * value, -1, keepdims=True) + eps)) * rounded(weight))

    def rotated(heads):
        one, two = np.split(heads, 2, axis=-1)
        return rounded(np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1))

    with np.errstate(all="ignore"):
        for b, block in enumerate(blocks):
            counts.append({})
            keys, values = (rounded(a)[0].copy() for a in cache[b])
            kv_heads, dim = keys.shape[1:]
            inputs = products(b, "attn_in", normed(stream, block["attn_norm"]), "q", "k", "v")
            query, key, value = (y.reshape(-1, dim) for y in inputs)
            if "q_norm" in block:
                query, key = normed(query, block["q_norm"]), normed(key, block["k_norm"])
            query, keys[slot], values[slot] = rotated(query), rotated(key), value
            caches.append((keys, values))
            first = max(int(start[0]), 0 if windows[b] is None else slot - windows[b] + 1)
            seen = slice(first, slot + 1)
            grouped = query.reshape(kv_heads, -1, dim)
            scores = np.einsum("kgd,skd->kgs", grouped, keys[seen]) * dim**-0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            merged = np.einsum("kgs,skd->kgd", weights / weights.sum(-1, keepdims=True), values[seen])
            stream = rounded(stream + products(b, "attn_out", rounded(merged).reshape(-1), "o")[0])
            gate, up = products(b, "mlp_in", normed(stream, block["mlp_norm"]), "gate", "up")
            hidden = rounded(gate / (1 + np.exp(-gate)) * up)
            stream = rounded(stream + products(b, "mlp_mid", hidden, "down")[0])
    return stream, caches, counts


def assert_right(inputs, config=None, tolerance=1e-3):
    (x, cache, counts, _), (stream, caches, expected) = run(inputs, config), written_out(*inputs)
    assert relative_error(x[0], stream) < tolerance
    for own, other in zip(cache, caches, strict=True):
        assert max(relative_error(a[0], b) for a, b in zip(own, other, strict=True)) < tolerance
    assert [{g: n.sum(1).tolist() for g, n in found.items()} for found in counts] == expected


def ulp(value):
    """Of a bfloat16 of this size."""
    return 2.0 ** (np.floor(np.log2(np.maximum(np.abs(value), 1e-30))) - 7)


def assert_each_sum_is_right(inputs, config=None):
    """Every product against float64 before it is rounded, from the inputs that the kernel itself had.

    A sum near the middle of two bfloat16 may be rounded to either, and all that follows then differs. So each stage of
    one block starts here from what the kernel left in its mailboxes, and may be off by no more than its float32
    additions are. On the tensor cores a weight stands with its format's surplus, which is taken off afterwards.
    """
    x, (block,), _, (thresholds,), *_ = inputs
    shape = block_shape(block, inputs[2][0][0].shape[3], EPS)
    config = config or (CONFIG if shape.format.group is None else NARROW)
    new_x, ((_, values),), _, exchange = run(inputs, config)
    at, work, words = memory_layout(shape, config).exchange, tasks(shape, config), np.asarray(exchange)[:, 0]
    splits = {group: cut.splits for group, cut in products(shape, config).items()}
    forms, scaled = shape.format.row_forms, shape.format.scaled

    def sent(part, count, splits=1):
        return words[at[part] :][: splits * count].view(np.float32).reshape(splits, -1).astype(np.float64)

    def sent_pairs(part, count):
        return np.ascontiguousarray(words[at[part] :][: count // 2]).view(jnp.bfloat16).astype(np.float64)

    def near(rounds):
        """What rounding gives, and how much else where what is rounded is off by a few units of float32."""
        value, *others = (rounds(1 + side * 2.0**-20) for side in (0, -1, 1))
        return value, sum(np.abs(other - value) for other in others)

    def product(group, value, doubt, *names):
        """The sums in float64, and how far off they may be."""
        keeps = (np.abs(value) >= np.asarray(thresholds[group])).reshape(len(names), shape.planes, -1)
        steps = [Task(*fields).step for fields in work[:, PHASES.index(group)] if Task(*fields).working]
        # Additions one after the other of a lane, to its sums and to those of the values, and the subtraction.
        additions = 2 + sum(-(-value.size // splits[group] * n // min(steps)) + 1 for n in {1, shape.planes - 1} - {0})
        out, bounds = [], []
        for keep, name in zip(keeps, names, strict=True):
            planes, scale = dequantised(block[name]), np.abs(np.asarray(block[name].get("scale", 1.0), np.float64))
            scale = scale.T[:, np.arange(planes[0].shape[1]) // GROUP] if shape.format.group is not None else scale
            with_surplus = [
                np.abs(plane) + (max(form.surplus or (0,)) * form.step * scale if scaled else 0)
                for plane, form in zip(planes, forms, strict=True)
            ]
            read, added = (
                sum(np.where(own[:, None], plane, 0) for own, plane in zip(keep, terms, strict=True))
                for terms in (planes, with_surplus)
            )
            out.append(value @ read)
            bounds.append(additions * 2.0**-23 * (np.abs(value) @ added) + doubt @ np.abs(read))
        return np.concatenate(out), np.concatenate(bounds)

    def normed(stream, name):
        scaled = stream / np.sqrt(np.mean(stream * stream) + EPS)
        return near(lambda share: rounded(rounded(scaled * share) * rounded(block[name])))

    def with_bias(name, total):
        return rounded(total) + rounded(block[name]["bias"]) if "bias" in block[name] else total

    def halves(name, stream, total):
        """The product, the bias and the stream are each rounded once."""
        return (ulp(stream) + ulp(total) + ulp(with_bias(name, total))) / 2 + 1e-6

    own = sent("qkv", sum(shape.sizes_in), splits["attn_in"]).sum(0)
    expected, bound = product("attn_in", *normed(rounded(x)[0], "attn_norm"), "q", "k", "v")
    assert (np.abs(own - expected) <= bound).all()
    new = with_bias("v", own[-shape.sizes_in[2] :])
    assert (np.abs(rounded(values)[0, int(inputs[5])].reshape(-1) - new) <= ulp(new)).all()

    attended = sent("attended", shape.attended, config.attention_splits)
    tops, sums = (
        sent("weights", 2 * shape.heads, config.attention_splits).reshape(-1, shape.heads, 2).transpose(2, 0, 1)
    )
    share = np.exp(tops - tops.max(0))
    merged = (attended * share.repeat(shape.head_dim, 1)).sum(0) / (sums * share).sum(0).repeat(shape.head_dim)
    own = sent("out", shape.hidden, splits["attn_out"]).sum(0)
    expected, bound = product("attn_out", *near(lambda share: rounded(merged * share)), "o")
    assert (np.abs(own - expected) <= bound).all()
    middle = sent_pairs("middle", shape.hidden)
    assert (np.abs(middle - rounded(x)[0] - with_bias("o", own)) <= halves("o", middle, own)).all()

    expected, bound = product("mlp_in", *normed(middle, "mlp_norm"), "gate", "up")
    gate, up = (with_bias(name, one) for name, one in zip(("gate", "up"), np.split(expected, 2), strict=True))
    off = [slack + ulp(one) for slack, one in zip(np.split(bound, 2), np.split(expected, 2), strict=True)]
    hidden, silu = sent_pairs("gated", shape.intermediate), gate / (1 + np.exp(-gate))
    # The slope of silu is below 1.1.
    assert (
        np.abs(hidden - silu * up) <= 1.1 * off[0] * np.abs(up) + (np.abs(silu) + off[0]) * off[1] + ulp(hidden)
    ).all()

    own = sent("down", shape.hidden, splits["mlp_mid"]).sum(0)
    expected, bound = product("mlp_mid", hidden, np.zeros_like(hidden), "down")
    assert (np.abs(own - expected) <= bound).all()
    stream = rounded(new_x)[0]
    assert (np.abs(stream - middle - with_bias("down", own)) <= halves("down", stream, own)).all()


ALL = ("q", "k", "v", "o", "gate", "up", "down")  # layers
ONE_ULP = 2**-8  # of a bfloat16: where a sum was rounded the other way, all that follows is off by so much
CASES = {
    "plain": {},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4"},
    "int4, parts of a scale's columns": {"weights": "int4", "hidden": 160, "dim": 64, "kv_heads": 1, "group": 3},
    "planes": {"weights": "int4+2+2"},
    "planes of 4 bits": {"weights": "int4+4", "hidden": 160, "dim": 64, "kv_heads": 1, "group": 3},
    "biases of some, planes": {"biased": ("q", "k", "v", "up"), "weights": "int4+2+2", "qk_norm": True},
    "biases": {"biased": ALL},
    "biases of some": {"biased": ("o", "up")},
    "biases of others, int4": {"biased": ("q", "k", "v", "gate", "down"), "weights": "int4"},
    "norms of heads": {"qk_norm": True, "biased": ALL, "weights": "int8"},
    "wide heads": {"dim": 128, "group": 1, "hidden": 256},
    "many queries": {"dim": 64, "group": 4, "kv_heads": 1},
    "wide inner": {"inner": 720},
    "odd sizes": {"hidden": 104, "inner": 264},
    "first token": {"slot": 0, "start": 0},
    "long context": {"slot": 500, "start": 0},
    "window": {"slot": 200, "window": 70},
    "window longer than the context": {"slot": 30, "window": 70},
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_block_written_out(case):
    inputs = arguments(**CASES[case])
    assert_each_sum_is_right(inputs)
    assert_right(inputs, tolerance=ONE_ULP if "planes" in case or case == "wide heads" else 1e-3)


@pytest.mark.parametrize("weights", ["int4", "int4+2+2"])
def test_tiles_of_two_scales(weights):
    inputs = arguments(hidden=256, inner=1280, dim=128, group=1, weights=weights)
    shape = block_shape(inputs[1][0], 128, EPS)
    assert [sets(shape, product) for product in products(shape, WIDE).values()] == [2, 2, 2, 2]
    assert_each_sum_is_right(inputs, WIDE)
    assert_right(inputs, WIDE, tolerance=1e-3 if weights == "int4" else ONE_ULP)


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4", "int4+2+2", "int4+4"])
@pytest.mark.parametrize("seed", range(6))
def test_sums_before_they_are_rounded(weights, seed):
    """With all channels kept, and with half of them."""
    inputs = arguments(weights=weights, seed=seed)
    assert_each_sum_is_right(inputs)
    assert_each_sum_is_right(changed(inputs, thresholds=[{g: jnp.zeros_like(t) for g, t in inputs[3][0].items()}]))


def test_blocks_one_after_the_other():
    """A bfloat16 that is rounded the other way in one block is a difference in all values of the next."""
    assert_right(arguments(depth=2), tolerance=5e-3)


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        *(("xla", case) for case in ("plain", "norms of heads", "window", "planes")),
        *(("triton", case) for case in ("norms of heads", "planes")),
    ],
)
def test_so_are_the_other_implementations_of_a_step(implementation, case, triton):
    depth = 1 if case == "planes" else 2
    inputs = arguments(**CASES[case], depth=depth)
    how = triton if implementation == "triton" else {"implementation": "xla"}
    step = functools.partial(decode_step, windows=inputs[7], eps=EPS, **how)
    x, cache, counts, _ = jit_as_written(step)(*inputs[:7])
    stream, caches, expected = written_out(*inputs)
    assert relative_error(x[0], stream) < (ONE_ULP if depth == 1 else 5e-3)
    for own, other in zip(cache, caches, strict=True):
        assert max(relative_error(a[0], b) for a, b in zip(own, other, strict=True)) < 1e-3
    assert [{g: n.sum(1).tolist() for g, n in found.items()} for found in counts] == expected


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4", "int4+2+2"])
@pytest.mark.parametrize("kept", ["all", "none", "one"])
def test_all_none_and_one_kept(kept, weights):
    inputs = arguments(weights=weights)
    thresholds = {g: jnp.full_like(t, 0.0 if kept == "all" else jnp.inf) for g, t in inputs[3][0].items()}
    if kept == "one":
        thresholds = {g: t.at[:, 37].set(0.0) for g, t in thresholds.items()}
    assert_right(changed(inputs, thresholds=[thresholds]), tolerance=ONE_ULP if weights == "int4+2+2" else 1e-3)


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4", "int4+2+2"])
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_infinities_and_no_numbers_come_out_as_the_references(number, weights):
    inputs = arguments(weights=weights)
    (keys, values), thresholds = inputs[2][0], inputs[3][0]
    keeps = thresholds | {"attn_out": thresholds["attn_out"].at[0, 5].set(0.0)}
    assert_right(changed(inputs, cache=[(keys, values.at[0, 7, 0, 5].set(number))], thresholds=[keeps]))
    assert_right(changed(inputs, cache=[(keys.at[0, 7, 0, 5].set(number), values)], thresholds=[keeps]))
    assert_right(changed(inputs, x=inputs[0].at[0, 3].set(number)))


def test_real_thresholds_keep_what_the_reference_keeps():
    inputs = arguments(hidden=256, inner=704)
    rng = np.random.default_rng(1)
    thresholds = {g: jnp.asarray(rng.uniform(0.2, 1.2, t.shape).astype(np.float32)) for g, t in inputs[3][0].items()}
    thresholds |= {g: thresholds[g] / 4 for g in ("attn_out", "mlp_mid")}  # what comes there is smaller
    inputs = changed(inputs, thresholds=[thresholds])
    (found,), (expected,) = run(inputs)[2], written_out(*inputs)[2]
    for group, counts in expected.items():
        # Values that are rounded the other way may cross a threshold.
        assert np.abs(np.asarray(found[group]).sum(1) - counts).max() <= 2
        assert 0.1 * thresholds[group].shape[1] < min(counts) and max(counts) < 0.9 * thresholds[group].shape[1]


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("index", [0, 7])
def test_it_is_a_block_of_the_demo_model(real_block, weights, index):
    """On text of its own, with the channels that the reference keeps.

    Of int4 a value times its scale is rounded to a float16, and so some sums to the other bfloat16.
    """
    real = real_block(weights, index)
    thresholds = {}
    for group, layers in INPUT_GROUPS.items():
        keeps = [jnp.abs(real.inputs[n][0]).astype(jnp.float32) >= real.thresholds[n] for n in layers]
        thresholds[group] = jnp.where(jnp.stack(keeps), 0.0, jnp.inf)
    keys, values = (a[:1] for a in real.cache)
    place = jnp.int32(keys.shape[1] - 1), jnp.zeros(1, jnp.int32), [None]
    angles = real.cos[:1], real.sin[:1]
    inputs = real.x[:1], [real.params], [(keys, values)], [thresholds], angles, *place, EPS
    assert_right(inputs, tolerance=5e-3 if weights == "int4" else 1e-3)


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4", "int4+2+2"])
@pytest.mark.parametrize("implementation", ["mosaic", "xla"])
def test_a_factor_is_of_all_thresholds(weights, implementation):
    """Bit for bit what the thresholds times the factor give, and other channels than without."""
    inputs, factor = arguments(weights=weights), jnp.full(1, 1.37, jnp.float32)
    rng = np.random.default_rng(4)
    thresholds = {g: jnp.asarray(rng.uniform(0.1, 1.2, t.shape).astype(np.float32)) for g, t in inputs[3][0].items()}
    thresholds |= {g: thresholds[g] / 4 for g in ("attn_out", "mlp_mid")}
    config = CONFIG if FORMATS[weights].group is None else NARROW
    how = {"implementation": implementation} | (HOW if implementation == "mosaic" else {})

    def counts_and_stream(thresholds, factors=None):
        step = decode_step(*changed(inputs, thresholds=[thresholds]), factors=factors, fused_config=config, **how)
        return *(np.asarray(step.counts[0][group]) for group in PHASES), np.asarray(step.x.astype(jnp.float32))

    found = counts_and_stream(thresholds, factor)
    expected = counts_and_stream({g: t * 1.37 for g, t in thresholds.items()})
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert all((a.sum() < b.sum()) for a, b in zip(found[:4], counts_and_stream(thresholds)[:4], strict=True))


def test_launches_one_after_the_other_share_an_exchange():
    """Each takes only what was sent with its own flags."""
    inputs, exchange = arguments(), None
    x = expected = inputs[0]
    for flag in range(2, 5):
        x, _, _, exchange = run(changed(inputs, x=x), flag=flag, exchange=exchange)
        expected = written_out(*changed(inputs, x=expected))[0][None]
    assert relative_error(x, expected) < 1e-2


@pytest.mark.long
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    hidden=st.integers(4, 40).map(lambda n: 8 * n),
    inner=st.integers(4, 60).map(lambda n: 8 * n),
    dim=st.sampled_from([32, 64]),
    heads=st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1)]),
    slot=st.integers(0, 150),
    config=st.builds(
        FusedConfig,
        ctas=st.integers(9, 14),
        threads=st.sampled_from([128, 256]),
        splits_in=st.integers(1, 3),
        splits_out=st.integers(1, 3),
        splits_down=st.integers(1, 3),
        unit=st.sampled_from([1, 8]),
        attention_splits=st.integers(1, 3),
    ),
)
@example(184, 464, 32, (2, 2), 9, FusedConfig(11, 128, 3, 3, 1, 1, 2))  # few splits of down
def test_any_shape(hidden, inner, dim, heads, slot, config):
    inputs = arguments(hidden, inner, dim, heads[1], heads[0], slot=slot, start=slot // 3)
    shape = block_shape(inputs[1][0], dim, EPS)
    assume(problem(shape, config, 1, jnp.bfloat16) is None)
    assert_right(inputs, config)


SHAPE = FusedShape(4096, 14336, 32, 8, 128, "bfloat16", EPS, (), False)


@settings(max_examples=40, deadline=None)
@given(
    hidden=st.integers(1, 512).map(lambda n: 16 * n),
    inner=st.integers(1, 1200).map(lambda n: 16 * n),
    kv_heads=st.integers(1, 16),
    group=st.integers(1, 8),
    blocks=st.integers(16, 160),
    kind=st.sampled_from(["bfloat16", "int8", "int4", "int4+2+2"]),
)
def test_every_weight_is_multiplied_once(hidden, inner, kv_heads, group, blocks, kind):
    shape = FusedShape(hidden, inner, group * kv_heads, kv_heads, 64, kind, EPS, (), False)
    config = heuristic(shape, blocks, 1024)
    assume(problem(shape, config, 1, "bfloat16") is None)
    for phase, product in enumerate(products(shape, config).values()):
        seen = [np.zeros((product.splits, n), int) for n in product.sizes_out]
        channels = set()
        for fields in tasks(shape, config)[:, phase]:
            task = Task(*fields)
            if task.working:
                split = task.first_channel // product.channels
                layer = task.entry if phase == 0 else 0
                seen[layer][split, task.first_column : task.first_column + task.columns] += 1
                channels.add((task.first_channel, task.channels))
                assert task.rows >= 1 and task.width % SET == 0 and task.row_columns == task.width * product.each
                assert 0 <= task.row_columns - task.columns < SET * product.each
                assert task.start * 8 == task.first_column * shape.bits
                if shape.format.group is not None:
                    assert task.first_column % GROUP == 0
                    assert task.scales == task.first_column // GROUP * product.size_in * 2
                    assert task.next_scales == (product.size_in * 2 if task.columns > GROUP else 0)
                quads, counts = np.arange(config.threads // 4), np.arange(product.channels + 1)
                assert ((quads * task.narrow >> 16) == quads // task.width).all()
                assert (((counts + task.step - 1) * task.share >> 32) == -(-counts // task.step)).all()
        assert all((s == 1).all() for s in seen)
        assert sum(n for _, n in channels) == product.size_in and len(channels) == product.splits


@pytest.mark.parametrize(("kind", "line"), [("bfloat16", LINE), ("int8", LINE), ("int4", LINE // 2)])
def test_tiles_begin_at_lines_of_the_cache(kind, line):
    """Or at halves, where there are fewer lines in a row than processors."""
    shape = dataclasses.replace(SHAPE, kind=kind)
    found = tasks(shape, heuristic(shape, 132, 1024)).reshape(-1, len(Task._fields))
    assert all(Task(*fields).start % line == 0 for fields in found)


def test_what_it_cannot_run_is_refused():
    config = heuristic(SHAPE, 132, 1024)
    assert problem(SHAPE, config, 1, "bfloat16") is None
    for shape, changes, batch, reason in [
        ({}, {}, 2, "takes one sequence, found 2"),
        ({"kind": "float32"}, {}, 1, "int8, int4, int4+2+2 or int4+4, found bfloat16 and float32"),
        ({"intermediate": 14340}, {}, 1, "columns in multiples of 8, found [4096, 14340, 4096"),
        ({"hidden": 32776}, {}, 1, "inputs in multiples of 8, at most 32768, found 32776"),
        ({"head_dim": 80}, {}, 1, "heads of (32, 64, 128) features"),
        ({"heads": 72}, {}, 1, "at most 8 queries to a key head and one a warp, found 9"),
        ({"heads": 30}, {}, 1, "as many to a key head"),
        ({"biases": ("q",)}, {}, 1, "biases of q, k and v or of none"),
        ({}, {"attention_splits": 17}, 1, "a CTA for every key head and split, found 8 key heads"),
        ({"intermediate": 2**17}, {}, 1, "more than there are threads"),
        ({}, {"ctas": 8}, 1, "a CTA for every split and layer"),
        ({"hidden": 4352}, {"splits_out": 9, "splits_down": 9}, 1, "need fewer splits"),
        ({"hidden": 8192, "intermediate": 65536, "kind": "int8"}, {"threads": 1024}, 1, "at most 32768, found 65536"),
        ({"intermediate": 2**16, "kind": "int4"}, {"threads": 1024}, 1, "more than 2 scales a row"),
    ]:
        changed = dataclasses.replace(SHAPE, **shape), dataclasses.replace(config, **changes)
        assert reason in str(problem(*changed, batch, "bfloat16"))
    inputs = arguments(weights="float32")
    with pytest.raises(ValueError, match="implementation = 'mosaic': takes activations in bfloat16"):
        run(inputs)
    with pytest.raises(ValueError, match=r"exchange: expected .* from first_exchange, found \(3, 2\)"):
        run(arguments(), exchange=jnp.zeros((3, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"blocks: expected at most 2, .* found 3"):
        run(arguments(depth=3))
    if mosaic_problem() is not None:
        with pytest.raises(ValueError, match="implementation = 'mosaic' needs"):
            decode_step(*arguments(), implementation="mosaic")


@pytest.mark.skipif(mosaic_problem() is None, reason="nothing is simulated here")
@pytest.mark.parametrize("case", ["plain", "int8", "int4", "norms of heads", "window"])
def test_nothing_is_read_or_overwritten_without_a_barrier(monkeypatch, case):
    monkeypatch.setattr(launch, "Simulated", RaceChecker)
    assert_right(arguments(**CASES[case]))


@pytest.mark.skipif(mosaic_problem() is None, reason="nothing is simulated here")
def test_every_barrier_is_needed(monkeypatch):
    """Each one left out in turn, by file and line, is found out: the account sees what it is kept for."""
    sites, dropped = {}, None

    def stays(kind):
        caller = sys._getframe(2)
        site = Path(caller.f_code.co_filename).name, caller.f_lineno
        sites[site] = kind
        return site != dropped

    class Without(RaceChecker):
        def sync(self):
            return super().sync() if stays("sync") else None

        def sync_warp(self):
            return super().sync_warp() if stays("sync_warp") else None

    monkeypatch.setattr(launch, "Simulated", Without)
    inputs = arguments(**CASES["long context"])
    assert_right(inputs)
    assert len(sites) >= 16
    missed = []
    for site in sorted(sites):
        dropped = site
        try:
            assert_right(inputs)
        except Exception as error:
            if RACE not in str(error):
                raise
        else:
            missed.append((site[0], sites[site]))
    # One stands in the product's loop to hold back the compiler, which would move loads behind it.
    assert missed == [("products.py", "sync_warp")]
