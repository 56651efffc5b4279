"""Every kernel, at the true shapes of real models, through the whole lowering for a GPU that is not there."""

import dataclasses
import functools
import importlib
import re
import sys
import types
from importlib import resources

import jax
import jax.numpy as jnp
import pytest

from wisparse_jax.models.config import LAYERS, read_config
from wisparse_jax.models.decode import group_thresholds, kernel_token_logits
from wisparse_jax.models.forward import empty_cache
from wisparse_jax.models.mesh_decode import mesh_token_logits
from wisparse_jax.models.parameters import param_shapes
from wisparse_jax.models.quantise import quantise_params
from wisparse_jax.testing import lower_for_gpu
from wisparse_jax.testing.lowering import MOSAIC_CALL, TRITON_CALL

MODELS = ["llama-3.2-1b", "llama-3.1-8b", "llama-3-70b", "mistral-7b", "qwen2.5-7b", "qwen3-8b", "demo"]
LAUNCHES = 9  # of a block
# MLIR asks for it for every operation, and where there is none searches the whole path for it each time.
LOOKED_FOR = "jaxlib.mlir.dialects.tt"


@pytest.fixture(autouse=True)
def no_search_for_what_is_not_there(monkeypatch):
    try:
        importlib.import_module(LOOKED_FOR)
    except ImportError:
        monkeypatch.setitem(sys.modules, LOOKED_FOR, types.ModuleType(LOOKED_FOR))


@pytest.mark.parametrize("weights", ["bfloat16", "float32", "int8", "int4"])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", MODELS)
def test_a_decode_step_lowers(repository, name, batch, weights):
    text = lowered_step(repository, name, batch, weights, 1, "triton")
    assert text.count(TRITON_CALL) == LAUNCHES


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_fused_decode_step_lowers(repository, name, weights):
    """18 blocks: a launch of 16 and one of two, each with its cache where it was, and nothing of Triton's."""
    pytest.importorskip("kernels_pallas.lanes.mosaic", reason="needs jax 0.11", exc_type=ImportError)
    text = lowered_step(repository, name, 1, weights, 18, "mosaic")
    assert text.count(f"@{MOSAIC_CALL}") == 2
    assert TRITON_CALL not in text and text.count("operand_index = ") == 2 * 18 + 2


def test_the_exponential_of_the_mosaic_lanes_is_the_natural_one(monkeypatch):
    """Without a GPU nothing runs it; with one, the tests of the fused block do, as compiled."""
    mosaic = pytest.importorskip("kernels_pallas.lanes.mosaic", reason="needs jax 0.11", exc_type=ImportError)
    emitted = []
    monkeypatch.setattr(mosaic, "_f32", lambda: None)
    monkeypatch.setattr(mosaic.Mosaic, "_pure", lambda _, text, *args, **__: emitted.append((text, *args)))
    mosaic.Mosaic(32).exp(3.0)
    ((text, power),) = emitted
    assert text.startswith("ex2.approx.f32 ") and 2**power == pytest.approx(20.0855369231877, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "parts", "weights"),
    [("llama-3.1-8b", 2, "bfloat16"), ("llama-3-70b", 8, "int4"), ("qwen3-8b", 4, "int8")],
)
def test_a_step_on_a_mesh_lowers(repository, name, parts, weights):
    """The launches of one device, and three sums: of the embedding, after o and after down."""
    text = lowered_step(repository, name, 1, weights, 1, "triton", parts)
    assert text.count(TRITON_CALL) == LAUNCHES and len(re.findall(r"stablehlo\.all_reduce\"", text)) == 3
    # Each device multiplies with its own part of down alone.
    config = read_config(repository / f"configs/{name}.json")
    assert f"sparse_product_{config.intermediate_size // parts}x{config.hidden_size}" in text


def lowered_step(repository, name, batch, weights, blocks, implementation, parts=1):
    folder = (
        str(resources.files("wisparse_jax") / "demo_model") if name == "demo" else repository / f"configs/{name}.json"
    )
    config = read_config(folder)
    config = dataclasses.replace(config, num_blocks=blocks, windows=config.windows[:blocks])
    integers = weights in ("int8", "int4")
    params = param_shapes(config, "bfloat16" if integers else weights)
    if integers:
        params = jax.eval_shape(functools.partial(quantise_params, kind=weights), params)
    cache = jax.eval_shape(lambda: empty_cache(config, batch, 1024, params["embed"].dtype))
    thresholds = [{n: jax.ShapeDtypeStruct(config.layer_shapes[n][:1], jnp.float32) for n in LAYERS}] * blocks

    def step(params, tokens, slot, start, cache, thresholds):
        grouped = group_thresholds(thresholds)
        if parts > 1:
            mesh = jax.sharding.get_abstract_mesh()
            return mesh_token_logits(config, params, tokens, slot, start, cache, grouped, mesh, implementation)
        return kernel_token_logits(config, params, tokens, slot, start, cache, grouped, implementation)

    ids, slot = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    axes = {"data": 1, "model": parts} if parts > 1 else None
    return lower_for_gpu(step, params, ids, slot, ids, cache, thresholds, axes=axes)
