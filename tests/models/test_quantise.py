import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wisparse_jax as ws
from kernels_pallas.formats.base import GROUP
from kernels_pallas.sparse_linear.reference import dot
from kernels_pallas.weight import Weight
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.fingerprint import model_fingerprint
from wisparse_jax.models.formats import ROUNDED
from wisparse_jax.models.quantise import quantise, rounded
from wisparse_jax.models.widen import widened_where_faster
from wisparse_jax.search import SearchSettings
from wisparse_jax.sparsity.score import channel_norms
from wisparse_jax.testing import normal, relative_error, tiny_config, tiny_model

every_kind = pytest.mark.parametrize("kind", ROUNDED)


def test_no_int8_weight_is_off_by_more_than_half_a_scale():
    kernel = jax.random.normal(jax.random.key(0), (50, 30)) * jnp.geomspace(1e-3, 1e3, 30)[None]
    kernel = kernel.at[:, 4].set(0)
    small, scale = rounded(kernel, "int8")
    assert small.dtype == jnp.int8 and int(jnp.abs(small).max()) == 127
    off = np.abs(small.astype(jnp.float32) * scale[None] - kernel)
    assert (off <= 0.5001 * scale[None]).all() and not np.asarray(small[:, 4]).any()


def int4_written_out(weight):
    """Number by number, from the bytes."""
    values, scales = np.asarray(weight.values), np.asarray(weight.scales, np.float32)
    out = np.zeros((values.shape[0], 2 * values.shape[1]), np.float32)
    for i, j in np.ndindex(out.shape):
        out[i, j] = (int(values[i, j // 2]) >> 4 * (j % 2)) % 16 - 8
        out[i, j] *= scales[j // GROUP, i]
    return out


def test_int4_rounds_to_the_nearest_of_sixteen_with_a_scale_for_128_columns():
    """The squared error is a fifth below that with largest / 7."""
    kernel = np.array(normal(0, 20, 300) * jnp.geomspace(1e-3, 1e3, 20)[:, None])
    kernel[3] = 0
    weight = rounded(jnp.asarray(kernel), "int4")
    assert weight.shape == (20, 300) and weight.values.shape == (20, 150) and weight.scales.shape == (3, 20)
    wide = int4_written_out(weight)
    np.testing.assert_array_equal(wide, weight.wide())
    np.testing.assert_array_equal(wide, weight.wide(jnp.bfloat16).astype(jnp.float32))
    assert not wide[3].any()
    ratios = []
    for group in range(3):
        columns = slice(GROUP * group, min(300, GROUP * (group + 1)))
        own, steps = kernel[:, columns], np.asarray(weight.scales[group], np.float32)[:, None]
        nearest = np.clip(np.rint(own / steps), -8, 7) * steps
        np.testing.assert_allclose(wide[:, columns], nearest, rtol=1e-6)
        plain = np.maximum(np.abs(own).max(1, keepdims=True) / 7, 1e-30)
        plain = np.square(np.rint(own / plain) * plain - own).sum(1)
        ratios.append(np.square(wide[:, columns] - own).sum(1)[kernel.any(1)] / plain[kernel.any(1)])
    assert np.mean(ratios) < 0.8


def test_int4_needs_columns_in_pairs():
    with pytest.raises(ws.WisparseError, match="int4 weights: expected an even number of columns, found 5"):
        rounded(jnp.ones((4, 5)), "int4")


@every_kind
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_dense_product_is_that_of_the_weights_written_out(kind, dtype):
    weight, x = rounded(normal(0, 96, 160), kind), normal(1, 3, 96, dtype=dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(weight.wide(), np.float64)
    # In bfloat16 the product itself is rounded.
    assert relative_error(dot(x, weight), expected) < (1e-6 if dtype == jnp.float32 else 2.5e-3)


@every_kind
def test_a_model_is_the_one_with_rounded_weights(kind):
    model = tiny_model(tiny_config(qkv_bias=True, tied_embeddings=True))
    small = quantise(model, kind)
    blocks = []
    for block in small.params["blocks"]:
        made = dict(block)
        for name in LAYERS:
            layer = dict(block[name])
            weight = Weight.of(layer)
            assert weight.kind == kind and weight.shape == model.config.layer_shapes[name]
            made[name] = {k: v for k, v in layer.items() if k != "scale"} | {"kernel": weight.wide()}
        blocks.append(made)
    wide = type(model)(model.config, small.params | {"blocks": blocks})
    tokens = jax.random.randint(jax.random.key(1), (2, 20), 0, model.config.vocab_size)
    expected = wide(tokens)
    np.testing.assert_allclose(small(tokens), expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))
    assert (np.asarray(model(tokens)) != np.asarray(expected)).any()
    norms = channel_norms(*Weight.of(small.params["blocks"][0]["q"]))
    np.testing.assert_allclose(norms, channel_norms(wide.params["blocks"][0]["q"]["kernel"]), rtol=1e-5)


@every_kind
def test_a_plan_for_the_model_applies_to_its_rounded_form(tiny_model, tiny_plan, tiny_tokens, kind):
    small = quantise(tiny_model, kind)
    assert model_fingerprint(small) == model_fingerprint(tiny_model)
    sparse = ws.apply(small, tiny_plan)
    models = {"rounded": small, "both": sparse, "plan": ws.apply(tiny_model, tiny_plan)}
    result = ws.evaluate(tiny_model, tiny_tokens, models)
    kl = {name: score.kl.mean for name, score in result.sparse.items()}
    assert 0 < kl["rounded"] < kl["plan"] and kl["rounded"] < kl["both"]
    assert result.sparse["rounded"].sparsity.mean == 0 and abs(result.sparse["both"].sparsity.mean - 0.5) < 0.1


@pytest.fixture(scope="module")
def tiny_plan(tiny_model, tiny_tokens):
    return ws.calibrate(tiny_model, tiny_tokens, 0.5, "wina", settings=SearchSettings(compare_teal=False))


@pytest.mark.parametrize(
    ("kind", "sparse"), [("int8", False), ("int8", True), ("int4", False), ("int4", True), ("int4+2+2", False)]
)
def test_what_a_cpu_widens_computes_the_same(tiny_tokens, kind, sparse):
    """The numbers are those of the integers; the model keeps its plan, which holds what is skipped."""
    dense = tiny_model(tiny_config(qkv_bias=True))
    model = quantise(dense, kind, "int8")
    if sparse:
        plan = ws.calibrate(dense, tiny_tokens, 0.5, "wina", settings=SearchSettings(compare_teal=False))
        model = ws.apply(model, plan)
    made, line = widened_where_faster(model)
    if jax.default_backend() != "cpu":
        assert made is model and line is None
        return
    assert line == "integer weights are widened to float32 once, as a CPU is faster so"
    assert made.weights == made.head == "float32" and made.plan is model.plan and made.config == model.config
    for mine, theirs in zip(made.params["blocks"], model.params["blocks"], strict=True):
        for name in LAYERS:
            np.testing.assert_array_equal(mine[name]["kernel"], Weight.of(theirs[name]).wide())
            assert ("bias" in mine[name]) == ("bias" in theirs[name]) and "scale" not in mine[name]
    assert relative_error(made(tiny_tokens), model(tiny_tokens)) < 1e-5
    assert ws.generate(made, [[5, 9, 2]], 12) == ws.generate(model, [[5, 9, 2]], 12)


def test_what_is_not_widened_says_why(tiny_model, tiny_tokens, monkeypatch):
    assert widened_where_faster(tiny_model) == (tiny_model, None)
    if jax.default_backend() != "cpu":
        return
    rounded_model = quantise(tiny_model, "int8")
    monkeypatch.setattr("wisparse_jax.models.widen._free_memory", lambda: 1000)
    made, line = widened_where_faster(rounded_model)
    assert made is rounded_model and line is not None and line.endswith("GB are free") and "slower on a CPU" in line
    monkeypatch.setattr("wisparse_jax.models.widen._free_memory", lambda: None)  # nothing says how much there is
    assert widened_where_faster(rounded_model)[0].weights == "float32"
    settings = SearchSettings(absolute_steps=2, skipped_steps=2, heads_steps=2, gradient_tokens=96)
    plan = ws.calibrate(tiny_model, tiny_tokens, bits=3.3, settings=settings)
    planes = ws.apply(tiny_model, plan)
    made, line = widened_where_faster(planes)
    assert made is planes and line is not None and line.endswith("a plan for planes reads them as they are")
