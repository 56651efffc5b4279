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

from kernels_pallas.formats import FORMATS
from wisparse_jax.inference.steps import kernel_step
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


@pytest.mark.parametrize("weights", ["bfloat16", "float32", "int8", "int4", "int4+2+2"])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", MODELS)
def test_a_decode_step_lowers(repository, name, batch, weights):
    text = lowered_step(repository, name, batch, weights, 1, "triton")
    assert text.count(TRITON_CALL) == LAUNCHES


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4", "int4+2+2"])
@pytest.mark.parametrize("name", MODELS)
def test_a_fused_decode_step_lowers(repository, name, weights):
    """18 blocks: a launch of 16 and one of two, each with its cache where it was, and nothing of Triton's."""
    pytest.importorskip("kernels_pallas.lanes.mosaic", reason="needs jax 0.11", exc_type=ImportError)
    if (name, weights) == ("llama-3-70b", "int4+2+2"):
        # The lists of three planes of 8,192 channels for gate and up; it decodes by Triton.
        with pytest.raises(ValueError, match="bytes of shared memory, more than"):
            lowered_step(repository, name, 1, weights, 18, "mosaic")
        return
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


@pytest.mark.parametrize(
    ("batch", "parts", "implementation"), [(1, 1, "triton"), (4, 1, "triton"), (4, 2, "triton"), (1, 1, "mosaic")]
)
def test_a_step_whose_share_is_held_lowers(repository, batch, parts, implementation):
    """With factors of its own for each sequence, no launch more, and no product of thresholds outside them."""
    if implementation == "mosaic":
        pytest.importorskip("kernels_pallas.lanes.mosaic", reason="needs jax 0.11", exc_type=ImportError)
    text = lowered_step(repository, "llama-3.1-8b", batch, "bfloat16", 1, implementation, parts, held=True)
    call, launches = (MOSAIC_CALL, 1) if implementation == "mosaic" else (TRITON_CALL, LAUNCHES)
    assert text.count(f"@{call}" if implementation == "mosaic" else call) == launches
    # Those of q, k and v, or of gate and up, of all sequences or of each.
    assert re.search(r"stablehlo.multiply ", text)
    assert not re.search(r"stablehlo.multiply .* : tensor<[23]x(\d+x)?\d+xf32>", text)


def lowered_step(repository, name, batch, weights, blocks, implementation, parts=1, held=False):
    folder = (
        str(resources.files("wisparse_jax") / "demo_model") if name == "demo" else repository / f"configs/{name}.json"
    )
    config = read_config(folder)
    config = dataclasses.replace(config, num_blocks=blocks, windows=config.windows[:blocks])
    integers = FORMATS[weights].scaled
    params = param_shapes(config, "bfloat16" if integers else weights)
    if integers:
        params = jax.eval_shape(functools.partial(quantise_params, kind=weights), params)
    cache = jax.eval_shape(lambda: empty_cache(config, batch, 1024, params["embed"].dtype))
    thresholds = [{n: jax.ShapeDtypeStruct(config.layer_shapes[n][:1], jnp.float32) for n in LAYERS}] * blocks

    def step(params, tokens, slot, start, cache, thresholds):
        grouped = group_thresholds(thresholds, len(FORMATS[weights].planes))
        if parts > 1:
            mesh = jax.sharding.get_abstract_mesh()
            return mesh_token_logits(config, params, tokens, slot, start, cache, grouped, mesh, implementation)
        return kernel_token_logits(config, params, tokens, slot, start, cache, grouped, implementation)

    def held_step(params, tokens, slot, start, cache, thresholds, factors):
        mesh = jax.sharding.get_abstract_mesh() if parts > 1 else None
        step = kernel_step(config, params, group_thresholds(thresholds), mesh, implementation=implementation)
        return step(tokens, slot, start, cache, factors)

    ids, slot = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    axes = {"data": 1, "model": parts} if parts > 1 else None
    if held:
        factors = jax.ShapeDtypeStruct((batch,), jnp.float32)
        return lower_for_gpu(held_step, params, ids, slot, ids, cache, thresholds, factors, axes=axes)
    return lower_for_gpu(step, params, ids, slot, ids, cache, thresholds, axes=axes)
