"""The fused block, compiled where there is a Hopper GPU and simulated elsewhere, against the block written out."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

from kernels_pallas.fused_block import FusedConfig, FusedShape, block_shape, first_exchange, fused_block
from kernels_pallas.fused_block.config import heuristic, problem
from kernels_pallas.fused_block.layout import Task, products, tasks
from kernels_pallas.implementation import mosaic_problem

CONFIG = FusedConfig(blocks=12, threads=128, splits_out=2, splits_down=3, splits_in=2)
HOW: dict[str, Any] = {"implementation": "mosaic", "interpret": mosaic_problem() is not None}
HEADS, EPS = 4, 1e-5


def arguments(
    hidden=128, inner=352, dim=32, kv=64, splits=3, weights="bfloat16", biased=False, last=False, seed=0
) -> Any:
    """What `fused_block` takes, half of the channels kept by thresholds of 0 and of infinity, so that none is close."""
    # NumPy's numbers: JAX's would compile for every shape.
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype: Any = jnp.float32, scale=1.0):
        return jnp.asarray((rng.standard_normal(shape) * scale).astype(dtype))

    attended = HEADS * dim
    sizes = {"o": (attended, hidden), "gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    if not last:
        sizes |= {"q": (hidden, attended), "k": (hidden, kv), "v": (hidden, kv)}
    layers = {}
    for name, (size_in, size_out) in sizes.items():
        if weights == "int8":
            kernel = jnp.asarray(rng.integers(-128, 128, (size_in, size_out)).astype(np.int8))
            scale = jnp.asarray((rng.uniform(0.5, 1.5, size_out) / 74 / size_in**0.5).astype(np.float32))
            layers[name] = {"kernel": kernel, "scale": scale}
        else:
            layers[name] = {"kernel": normal(size_in, size_out, dtype=weights, scale=size_in**-0.5)}
        if biased:
            layers[name]["bias"] = normal(size_out, dtype=jnp.bfloat16)
    total = jnp.asarray(rng.uniform(0.5, 1.5, (1, splits, HEADS)).astype(np.float32))
    attention = normal(1, splits, attended), normal(1, splits, HEADS), total
    norms = [jnp.asarray((1 + 0.2 * rng.standard_normal(hidden)).astype(jnp.bfloat16)) for _ in range(2)]
    groups = {"attn_out": (1, attended), "mlp_in": (2, hidden), "mlp_mid": (1, inner), "attn_in": (3, hidden)}
    limits = {
        g: jnp.asarray(np.where(rng.random(shape) < 0.5, 0.0, np.inf).astype(np.float32)) for g, shape in groups.items()
    }
    x = normal(1, hidden, dtype=jnp.bfloat16)
    return x, attention, layers, (norms[0], None if last else norms[1]), limits, EPS


def run(inputs: Any, config=CONFIG, tag=1) -> Any:
    shape = block_shape(inputs[2], HEADS, inputs[1][1].shape[1], EPS)
    exchange = first_exchange(shape, config)
    return fused_block(*inputs, exchange=exchange, tag=tag, config=config, **HOW)


def rounded(a):
    return np.asarray(np.asarray(a), jnp.bfloat16).astype(np.float64)


def written_out(x, attention, layers, norms, limits, eps):
    """The block in float64, rounded to bfloat16 where the model rounds."""
    partial, highest, total = (np.asarray(a, np.float64)[0] for a in attention)
    limits = {g: np.asarray(t) for g, t in limits.items()}
    counts = {}

    def products(group, value, *names):
        keeps = np.abs(value) >= limits[group]
        counts[group] = keeps.sum(1).tolist()
        out = []
        for keep, name in zip(keeps, names, strict=True):
            layer = layers[name]
            y = np.where(keep, value, 0) @ np.asarray(layer["kernel"], np.float64)
            y = y * np.asarray(layer.get("scale", 1.0), np.float64)
            if name in "qkv":
                out.append(y)
                continue
            y = rounded(y)
            out.append(rounded(y + rounded(layer["bias"])) if "bias" in layer else y)
        return out

    def normed(value, weight):
        return rounded(rounded(value / np.sqrt(np.mean(value * value) + eps)) * rounded(weight))

    with np.errstate(all="ignore"):
        share = np.exp(highest - highest.max(0))
        heads = partial.reshape(*share.shape, -1)
        merged = (heads * share[..., None]).sum(0) / (total * share).sum(0)[:, None]
        value = rounded(x)[0]
        value = rounded(value + products("attn_out", rounded(merged).reshape(-1), "o")[0])
        gate, up = products("mlp_in", normed(value, norms[0]), "gate", "up")
        hidden = rounded(gate / (1 + np.exp(-gate)) * up)
        value = rounded(value + products("mlp_mid", hidden, "down")[0])
        if norms[1] is None:
            return value, [], counts
        return value, products("attn_in", normed(value, norms[1]), "q", "k", "v"), counts


def error(found, expected):
    """Relative, of the sum over partial sums; infinite where one has a number and the other has none."""
    one = np.asarray(found, np.float64).reshape(-1, found.shape[-1]).sum(0)
    real = np.isfinite(expected)
    if not (np.isfinite(one) == real).all():
        return np.inf
    return np.linalg.norm(one[real] - expected[real]) / max(np.linalg.norm(expected[real]), 1e-30)


def assert_right(inputs, config=CONFIG, tolerance=1e-3):
    found, (stream, products_, counts) = run(inputs, config), written_out(*inputs)
    assert error(found[0], stream) < tolerance
    for one, other in zip(found[1], products_, strict=True):
        assert error(one, other) < tolerance
    assert {g: n.sum(1).tolist() for g, n in found[2].items()} == counts


CASES = {
    "plain": {},
    "int8": {"weights": "int8"},
    "biases": {"biased": True},
    "int8 and biases": {"weights": "int8", "biased": True},
    "last block": {"last": True},
    "one split of attention": {"splits": 1},
    "many splits of attention": {"splits": 20},
    "wide inner": {"inner": 720},
    "odd sizes": {"hidden": 104, "inner": 264, "dim": 20, "kv": 40},
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_block_written_out(case):
    assert_right(arguments(**CASES[case]))


@pytest.mark.parametrize("case", ["plain", "int8 and biases", "last block"])
def test_so_is_the_reference(case):
    """Which rounds silu and the product with up one after the other: a bfloat16 apart."""
    inputs = arguments(**CASES[case])
    stream, products_, counts = written_out(*inputs)
    found = fused_block(*inputs, implementation="xla")
    assert error(found[0], stream) < 5e-3 and len(found[1]) == len(products_)
    for one, other in zip(found[1], products_, strict=True):
        assert error(one, other) < 5e-3
    assert {g: n.sum(1).tolist() for g, n in found[2].items()} == counts


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("kept", ["all", "none", "one"])
def test_all_none_and_one_kept(kept, weights):
    x, attention, layers, norms, limits, eps = arguments(weights=weights)
    limits = {g: jnp.full_like(t, 0.0 if kept == "all" else jnp.inf) for g, t in limits.items()}
    if kept == "one":
        limits = {g: t.at[:, 37].set(0.0) for g, t in limits.items()}
    assert_right((x, attention, layers, norms, limits, eps))


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_infinities_and_no_numbers_come_out_as_the_references(number, weights):
    x, attention, layers, norms, limits, eps = arguments(weights=weights)
    partial = attention[0].at[0, 1, 5].set(number)
    keeps = limits | {"attn_out": limits["attn_out"].at[0, 5].set(0.0)}
    assert_right((x, (partial, *attention[1:]), layers, norms, keeps, eps))
    assert_right((x.at[0, 3].set(number), attention, layers, norms, limits, eps))


def test_real_thresholds_keep_what_the_reference_keeps():
    x, attention, layers, norms, limits, eps = arguments(hidden=256, inner=704)
    rng = np.random.default_rng(1)
    limits = {g: jnp.asarray(rng.uniform(0.2, 1.2, t.shape).astype(np.float32)) for g, t in limits.items()}
    inputs = (x, attention, layers, norms, limits, eps)
    found, (_, _, expected) = run(inputs)[2], written_out(*inputs)
    for group, counts in expected.items():
        # Values that are rounded the other way may cross a threshold.
        assert np.abs(np.asarray(found[group]).sum(1) - counts).max() <= 2
        assert 0.1 * limits[group].shape[1] < min(counts) and max(counts) < 0.9 * limits[group].shape[1]


def test_launches_one_after_the_other_share_an_exchange():
    """Each takes only what was posted with its own tag."""
    inputs = arguments()
    shape = block_shape(inputs[2], HEADS, 3, EPS)
    exchange, x, expected = first_exchange(shape, CONFIG), inputs[0], inputs[0]
    for tag in range(1, 4):
        x, _, _, exchange = fused_block(x, *inputs[1:], exchange=exchange, tag=tag, config=CONFIG, **HOW)
        expected = written_out(expected, *inputs[1:])[0][None]
    assert error(x, expected[0]) < 5e-3


@pytest.mark.long
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    hidden=st.integers(4, 40).map(lambda n: 8 * n),
    inner=st.integers(4, 60).map(lambda n: 8 * n),
    dim=st.integers(2, 24).map(lambda n: 2 * n),
    kv=st.integers(1, 16).map(lambda n: 8 * n),
    config=st.builds(
        FusedConfig,
        blocks=st.integers(9, 14),
        threads=st.sampled_from([128, 256]),
        unroll=st.sampled_from([1, 2]),
        splits_out=st.integers(1, 3),
        splits_down=st.integers(1, 3),
        splits_in=st.integers(1, 3),
        unit=st.sampled_from([1, 2]),
    ),
)
@example(184, 464, 8, 112, FusedConfig(11, 128, splits_out=3, splits_down=1, splits_in=3, unit=1))  # few splits of down
def test_any_shape(hidden, inner, dim, kv, config):
    inputs = arguments(hidden, inner, dim, kv)
    shape = block_shape(inputs[2], HEADS, 3, EPS)
    assume(problem(shape, config, 1, "bfloat16", jnp.bfloat16) is None)
    assert_right(inputs, config)


SHAPE = FusedShape(4096, 14336, 4096, 32, 16, (4096, 1024, 1024), 2, EPS, ())


@settings(max_examples=40, deadline=None)
@given(
    hidden=st.integers(1, 512).map(lambda n: 16 * n),
    inner=st.integers(1, 1200).map(lambda n: 16 * n),
    kv=st.integers(1, 128).map(lambda n: 16 * n),
    blocks=st.integers(16, 160),
    item=st.sampled_from([1, 2]),
)
def test_every_weight_is_multiplied_once(hidden, inner, kv, blocks, item):
    shape = FusedShape(hidden, inner, hidden, 8, 4, (hidden, kv, kv), item, EPS, ())
    config = heuristic(shape, blocks)
    assume(problem(shape, config, 1, "bfloat16" if item == 2 else "int8", "bfloat16") is None)
    for phase, product in enumerate(products(shape, config).values()):
        seen = [np.zeros((product.splits, n), int) for n in product.sizes_out]
        channels = set()
        for fields in tasks(shape, config)[:, phase]:
            task = Task(*fields)
            if task.working:
                split = task.first_channel // product.channels
                seen[task.layer][split, task.first_column : task.first_column + task.columns] += 1
                channels.add((task.first_channel, task.channels))
                assert task.columns == task.width * product.each and task.rows >= 1
        assert all((s == 1).all() for s in seen)
        assert sum(n for _, n in channels) == product.size_in and len(channels) == product.splits


def test_what_it_cannot_run_is_refused():
    config = heuristic(SHAPE, 132)
    assert problem(SHAPE, config, 1, "bfloat16", "bfloat16") is None
    for shape, changes, batch, weights, reason in [
        ({}, {}, 2, "bfloat16", "takes one sequence, found 2"),
        ({}, {}, 1, "float32", "weights in bfloat16 or int8, found bfloat16 and float32"),
        ({"intermediate": 14340}, {}, 1, "bfloat16", "columns in multiples of 8, found [4096, 14340, 4096"),
        ({"attended": 4100, "heads": 41}, {}, 1, "bfloat16", "inputs in multiples of 8, at most 32768, found 4100"),
        ({"attended": 4097}, {}, 1, "bfloat16", "heads of a multiple of 4 features, found 32 in 4097"),
        ({"intermediate": 2**17}, {}, 1, "bfloat16", "more than there are threads"),
        ({}, {"blocks": 8}, 1, "bfloat16", "a block for every split and layer"),
        ({"hidden": 4352}, {"splits_out": 9, "splits_down": 9}, 1, "bfloat16", "need fewer splits"),
        (
            {"hidden": 8192, "intermediate": 65536, "item": 1},
            {"threads": 1024},
            1,
            "int8",
            "at most 32768, found 65536",
        ),
    ]:
        changed = dataclasses.replace(SHAPE, **shape), dataclasses.replace(config, **changes)
        assert reason in str(problem(*changed, batch, weights, "bfloat16"))
    inputs = arguments(weights="float32")
    with pytest.raises(ValueError, match="implementation = 'mosaic': takes activations in bfloat16"):
        run(inputs)
    with pytest.raises(ValueError, match=r"exchange: expected .* from first_exchange, found None"):
        fused_block(*arguments(), config=CONFIG, **HOW)
    if mosaic_problem() is not None:
        with pytest.raises(ValueError, match="implementation = 'mosaic' needs"):
            fused_block(*arguments(), implementation="mosaic")
