"""Models in nested planes: what each plane is worth on trained weights, and thresholds of each in every path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wisparse_jax as ws
from kernels_pallas.formats import FORMATS
from kernels_pallas.fused_block import FusedConfig
from kernels_pallas.implementation import mosaic_problem
from kernels_pallas.weight import Weight
from wisparse_jax.models.config import INPUT_GROUPS, LAYERS
from wisparse_jax.models.decode import fused_step_problem, group_thresholds, kernel_token_logits
from wisparse_jax.models.forward import empty_cache, token_logits
from wisparse_jax.models.mesh import param_specs
from wisparse_jax.models.model import Model
from wisparse_jax.models.parameters import flat
from wisparse_jax.models.quantise import quantise, quantise_params
from wisparse_jax.models.rules import rules_of
from wisparse_jax.testing import tiny_config, tiny_model

KIND = "int4+2+2"


def planes_read(model, planes, values=0.0):
    """The model reading the first planes of all channels whose input is not below a value."""
    below = [values if k < planes else np.inf for k in range(len(FORMATS[KIND].planes))]
    shapes = model.config.layer_shapes
    limits = {n: jnp.broadcast_to(jnp.asarray(below, jnp.float32)[:, None], (3, shapes[n][0])) for n in LAYERS}
    return Model(model.config, model.params, rules_of([limits] * model.config.num_blocks))


def test_every_plane_is_worth_its_bits_on_a_trained_model(demo, demo_text):
    """All planes are as good as int8 and the first as int4; the counts are those of what is read."""
    small = quantise(demo, KIND)
    models = {name: quantise(demo, name) for name in ("int8", "int4", KIND)}
    models |= {f"{planes} planes": planes_read(small, planes) for planes in (1, 2, 3)}
    result = ws.evaluate(demo, demo_text["held_out"][:4], models).sparse
    kl = {name: score.kl.mean for name, score in result.items()}
    one, two, three = (kl[f"{planes} planes"] for planes in (1, 2, 3))
    assert kl[KIND] < 3 * kl["int8"] and three == pytest.approx(kl[KIND], rel=0.02)
    assert 3 * three < two < one / 6 and one < 1.5 * kl["int4"]
    shares = [result[name].sparsity.mean for name in ("1 planes", "2 planes", "3 planes", KIND)]
    assert shares == pytest.approx([4 / 8.125, 2 / 8.125, 0, 0])


@pytest.fixture(scope="module")
def small():
    return quantise(tiny_model(tiny_config(hidden_size=64)), KIND)


def test_tokens_are_generated_dense_and_by_thresholds(small):
    """With thresholds of zero the dense model's; a prompt runs with all planes, whatever the thresholds."""
    prompt = [[5, 6, 7, 8]]
    dense = ws.generate(small, prompt, 8)
    np.testing.assert_array_equal(dense[0], ws.generate(planes_read(small, 3), prompt, 8, hold=False)[0])
    some = planes_read(small, 2, 0.3)
    tokens = ws.generate(some, prompt, 8, hold=False)[0]
    assert tokens[0] == dense[0][0]
    # The dense model's logits, with the weights written out.
    expected = np.asarray(small(jnp.asarray(prompt)))
    wide = small.params | {"blocks": [{k: _wide(v) for k, v in block.items()} for block in small.params["blocks"]]}
    other = type(small)(small.config, wide)(jnp.asarray(prompt))
    np.testing.assert_allclose(expected, other, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(some(jnp.asarray(prompt))) - expected).max() > 1e-3


def _wide(part):
    if not isinstance(part, dict):
        return part
    return {k: v for k, v in part.items() if k != "scale"} | {"kernel": Weight.of(part).wide()}


@pytest.mark.parametrize("planes", [True, False])
def test_the_kernels_step_is_the_masked_one(planes):
    """With thresholds of each plane, and of whole channels; what is read is counted by plane."""
    config = tiny_config(num_blocks=2, windows=(None, None))
    small, interpret = quantise(tiny_model(config), KIND), jax.default_backend() != "gpu"
    levels = jnp.asarray([0.2, 0.5, 0.9])[:, None] if planes else jnp.asarray([0.5])
    shapes = {n: (*levels.shape[:-1], config.layer_shapes[n][0]) for n in LAYERS}
    limits = [{n: jnp.broadcast_to(levels * (0.2 if n == "down" else 1), shapes[n]) for n in LAYERS}] * 2
    grouped, start, token = group_thresholds(limits, 3), jnp.zeros(1, jnp.int32), jnp.array([5])
    cache, records = empty_cache(config, 1, 32, jnp.float32), []
    place = token, jnp.int32(0), start, cache
    found, _ = kernel_token_logits(config, small.params, *place, grouped, "triton", interpret, records)
    expected, _ = token_logits(config, small.params, *place, rules_of(limits))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    counts = np.concatenate([record[g].sum(1).reshape(-1, 3) for record in records for g in INPUT_GROUPS])
    assert (np.diff(counts, axis=1) <= 0).all() and (np.diff(counts, axis=1) < 0).any() == planes


def test_the_fused_step_is_the_separate_one():
    """In bfloat16, by what is read of each plane and the logits; simulated where there is no Hopper GPU."""
    model = tiny_model(tiny_config(num_blocks=2, windows=(None, None), head_dim=32, intermediate_size=64))
    config, params = model.config, jax.tree.map(lambda w: w.astype(jnp.bfloat16), model.params)
    params, rng = quantise_params(params, KIND), np.random.default_rng(0)
    # Of 0 and of infinity, so that nothing is near its threshold.
    depth = {n: rng.integers(0, 4, config.layer_shapes[n][0]) for n in LAYERS}
    limits = {n: np.where(np.arange(3)[:, None] < own[None], 0, np.inf) for n, own in depth.items()}
    limits = [{n: jnp.asarray(own.astype(np.float32)) for n, own in limits.items()}] * 2
    grouped, start, interpret = group_thresholds(limits, 3), jnp.zeros(1, jnp.int32), mosaic_problem() is not None
    small = FusedConfig(ctas=6, threads=256, splits_in=1, splits_out=2, splits_down=2, attention_splits=2, depth=2)
    assert fused_step_problem(config, params, 1) is None
    caches, differences, kept = [empty_cache(config, 1, 32, jnp.bfloat16)] * 2, [], [[], []]
    for slot in range(2):
        token, out = jnp.array([3 + 5 * slot]), []
        for i, implementation in enumerate(("triton", "mosaic")):
            records = []
            place = token, jnp.int32(slot), start, caches[i], grouped, implementation, interpret, records
            logits, caches[i] = kernel_token_logits(config, params, *place, fused_config=small)
            out.append(np.asarray(logits))
            kept[i].append([int(n) for record in records for g in INPUT_GROUPS for n in record[g].sum(1)])
        differences.append(np.abs(out[1] - out[0]).max() / np.abs(out[0]).max())
    assert np.median(differences) < 0.02 and kept[0] == kept[1]
    assert kept[0][0][:3] == [int((depth["q"] > k).sum()) for k in range(3)]


def test_columns_that_do_not_fill_bytes_are_refused():
    odd = tiny_model(tiny_config(intermediate_size=66))
    with pytest.raises(ws.WisparseError, match=r"int4\+2\+2 weights: expected columns in multiples of 4, found 66"):
        quantise(odd, KIND)


def test_planes_lie_on_a_mesh_as_the_weight_does():
    config = tiny_config()
    shapes = jax.eval_shape(lambda: quantise_params(tiny_model(config).params, KIND, "int8"))
    specs = flat(param_specs(config, shapes, 1))
    for k in range(3):
        assert tuple(specs[f"blocks.0.q.kernel.{k}"]) == (None, "model")
        assert tuple(specs[f"blocks.0.o.kernel.{k}"]) == ("model", None)
    assert tuple(specs["blocks.0.q.scale"]) == ("model", None) and tuple(specs["blocks.0.o.scale"]) == (None, "model")
