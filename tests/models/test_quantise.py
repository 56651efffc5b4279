import jax
import jax.numpy as jnp
import numpy as np

import wisparse_jax as ws
from wisparse_jax.calibration import SearchSettings
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.loading import model_fingerprint
from wisparse_jax.models.quantise import quantise, quantise_kernel
from wisparse_jax.sparsity.score import channel_norms
from wisparse_jax.testing import tiny_config, tiny_model


def test_no_weight_is_off_by_more_than_half_a_scale():
    kernel = jax.random.normal(jax.random.key(0), (50, 30)) * jnp.geomspace(1e-3, 1e3, 30)
    kernel = kernel.at[:, 4].set(0)
    small, scale = quantise_kernel(kernel)
    assert small.dtype == jnp.int8 and int(jnp.abs(small).max()) == 127
    assert (np.abs(small * scale - kernel) <= 0.5001 * scale).all() and not np.asarray(small[:, 4]).any()


def test_an_int8_model_is_the_model_with_rounded_weights():
    model = tiny_model(tiny_config(qkv_bias=True, tied_embeddings=True))
    small = quantise(model)
    blocks = []
    for block in small.params["blocks"]:
        made = dict(block)
        for name in LAYERS:
            layer = dict(block[name])
            scale = layer.pop("scale")
            made[name] = layer | {"kernel": layer["kernel"] * scale}
        blocks.append(made)
    rounded = type(model).from_params(model.config, small.params | {"blocks": blocks})
    tokens = jax.random.randint(jax.random.key(1), (2, 20), 0, model.config.vocab_size)
    expected = rounded(tokens)
    np.testing.assert_allclose(small(tokens), expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))
    assert (np.asarray(model(tokens)) != np.asarray(expected)).any()
    norms = channel_norms(*(small.params["blocks"][0]["q"][k] for k in ("kernel", "scale")))
    np.testing.assert_allclose(norms, channel_norms(rounded.params["blocks"][0]["q"]["kernel"]), rtol=1e-5)


def test_a_plan_for_the_model_applies_to_its_int8_form(tiny_model, tiny_tokens):
    plan = ws.calibrate(tiny_model, tiny_tokens, 0.5, "wina", settings=SearchSettings())
    small = quantise(tiny_model)
    assert model_fingerprint(small) == model_fingerprint(tiny_model)
    sparse = ws.apply(small, plan)
    result = ws.evaluate(tiny_model, tiny_tokens, {"int8": small, "both": sparse, "plan": ws.apply(tiny_model, plan)})
    kl = {name: score.divergence.mean for name, score in result.sparse.items()}
    assert 0 < kl["int8"] < kl["plan"] and kl["int8"] < kl["both"]
    assert result.sparse["int8"].sparsity.mean == 0 and abs(result.sparse["both"].sparsity.mean - 0.5) < 0.1
