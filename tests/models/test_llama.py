"""A model: its parameters, where it comes from, and that making it costs what its size does."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wisparse_jax as ws
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.decoder import Decoder
from wisparse_jax.models.fingerprint import flat, model_fingerprint
from wisparse_jax.models.forward import head
from wisparse_jax.models.model import Model
from wisparse_jax.models.parameters import param_shapes
from wisparse_jax.testing import tiny_config

VARIANTS = {
    "plain": {},
    "tied, biases": {"tied_embeddings": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "norms of q and k": {"qk_norm": True, "qkv_bias": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_random_model_has_the_shapes_that_are_declared(variant: str, dtype: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    params, shapes = Model.random(config, nnx.Rngs(0), dtype).params, param_shapes(config, dtype)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    assert all(
        (a.shape, a.dtype) == (b.shape, b.dtype) for a, b in zip(*map(jax.tree.leaves, (params, shapes)), strict=True)
    )
    assert len({id(block) for block in shapes["blocks"]}) == config.num_blocks
    for path, leaf in flat(params).items():
        if leaf.ndim == 2:
            assert 0.015 < float(jnp.std(leaf.astype(jnp.float32))) < 0.025, path
        else:
            np.testing.assert_array_equal(leaf, 0 if path.endswith("bias") else 1)
    kernels = [np.asarray(block[name]["kernel"], np.float32) for block in params["blocks"] for name in ("k", "v")]
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels)


def test_parameters_share_memory_with_the_modules() -> None:
    decoder = Decoder(tiny_config(), nnx.Rngs(0))
    params, block = decoder.params, cast(Any, decoder.blocks[1])
    assert params["blocks"][1]["q"]["kernel"] is block.q.kernel[...]
    block.q.kernel[...] = jnp.zeros_like(block.q.kernel[...])
    assert not decoder.params["blocks"][1]["q"]["kernel"].any() and params["blocks"][1]["q"]["kernel"].any()


def test_shapes_and_modules_of_a_deep_model_take_no_time() -> None:
    """250 blocks took 160 s when the shapes were traced; 20 times the blocks may take about 20 times as long."""
    config = tiny_config(num_blocks=250, windows=(None,) * 250)
    started = time.process_time()  # of this process: others may keep the machine busy
    shapes = param_shapes(config)
    one = jnp.zeros(())
    model = Model(config, jax.tree.map(lambda _: one, shapes))
    assert len(model.params["blocks"]) == 250
    assert time.process_time() - started < 5


def test_a_fingerprint_is_that_of_the_checkpoint_until_the_weights_change(folder: Path) -> None:
    """Arrays do not change; a parameter that is set holds another one, and so the model is another one."""
    model = ws.load(folder)
    loaded, layer = model_fingerprint(model), model.params["blocks"][1]["down"]
    assert model.fingerprint == loaded
    before = layer["kernel"]
    layer["kernel"] = before.at[3, 5].add(1.0)  # not one of the elements that are sampled
    assert model.fingerprint is None and model.dense.fingerprint is None
    layer["kernel"] = 2 * before
    assert model_fingerprint(model) != loaded
    layer["kernel"] = before + 0  # the same numbers in another array
    assert model.fingerprint is None and model_fingerprint(model) == loaded
    layer["kernel"] = before
    assert model.fingerprint == loaded and Model(model.config, model.params).fingerprint is None


def test_a_fingerprint_keeps_no_weights_in_memory(folder: Path) -> None:
    model = ws.load(folder)
    layer = model.params["blocks"][1]["down"]
    kernel = weakref.ref(layer["kernel"])
    layer["kernel"] = layer["kernel"] + 1
    gc.collect()
    assert kernel() is None and model.fingerprint is None


def a_plan(model: Model) -> ws.SparsityPlan:
    """One that skips nothing."""
    zero = np.zeros((model.config.num_blocks, len(LAYERS)))
    return ws.SparsityPlan(
        "uniform", 0.0, zero, zero, zero, model.config.layer_weights, model_fingerprint(model), 0, zero
    )


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_plan_is_not_for_weights_that_were_changed_since(folder: Path, weights: str | None) -> None:
    model = ws.load(folder, weights=weights)
    plan = a_plan(model)
    ws.apply(model, plan)
    model.params["norm"] = model.params["norm"] * 2
    with pytest.raises(ws.PlanError, match="plan is for another model"):
        ws.apply(model, plan)


def test_a_model_says_what_it_is_and_its_other_forms_say_it_too(folder: Path) -> None:
    model = ws.load(folder, "bfloat16")
    plan, loaded = a_plan(model), model_fingerprint(model)
    assert (model.name, model.plan, model.rules, model.thresholds) == (folder.name, None, None, None)
    assert (model.weights, model.head, model.dtype) == ("bfloat16", "bfloat16", "bfloat16") and model.dense is model
    small = ws.quantise(model, "int8", "int8")
    sparse = ws.apply(small, plan)
    assert (sparse.weights, sparse.head, sparse.dtype) == ("int8", "int8", "bfloat16")
    for form in (small, sparse, sparse.dense, ws.load(folder, "bfloat16", plan=plan)):
        assert (form.name, form.fingerprint, form.basis_digest) == (folder.name, loaded, None)
    assert sparse.plan is plan and sparse.dense.plan is None and sparse.thresholds is not None
    # A model with a plan takes another one instead, and is not rounded after it.
    again = ws.apply(sparse, other := a_plan(model))
    assert again.plan is other and again.params is sparse.params
    with pytest.raises(ws.WisparseError, match="expected a dense model"):
        ws.quantise(ws.apply(model, plan))


def test_other_rules_are_not_the_plans(folder: Path) -> None:
    sparse = ws.load(folder, plan=a_plan(ws.load(folder)))
    rules = sparse.rules
    assert sparse.plan is not None and rules is not None
    rules[1]["up"] = rules[1]["up"]._replace(thresholds=cast(Any, rules[1]["up"].thresholds) + 1)
    assert sparse.plan is None


def test_a_dense_model_goes_through_jit_and_grad(folder: Path) -> None:
    model, tokens = ws.load(folder, "float32"), jnp.arange(3, 15)[None]
    run: Any = jax.jit(lambda m, ids: m(ids))
    np.testing.assert_allclose(run(model, tokens), model(tokens), rtol=1e-4, atol=1e-4)
    run(jax.tree.map(lambda leaf: leaf * 1, model), tokens)
    assert run._cache_size() == 1  # where a model comes from is no part of what is compiled

    def loss(own: Model) -> Any:
        return jnp.sum(own(tokens)[0, -1, :5])

    gradient = jax.grad(loss)(model)
    assert isinstance(gradient, Model) and gradient.fingerprint is None and gradient.name is None
    step = 1e-2
    moved = jax.tree.map(lambda leaf: leaf, model)
    moved.params["norm"] = moved.params["norm"].at[3].add(step)
    assert (loss(moved) - loss(model)) / step == pytest.approx(float(gradient.params["norm"][3]), rel=0.05, abs=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_row_of_a_tied_head_is_a_row_of_many(dtype: str) -> None:
    """On a CPU one row in float32 is multiplied the other way round."""
    keys = jax.random.split(jax.random.key(0))
    rows, embed = (jax.random.normal(key, (n, 96)).astype(dtype) for key, n in zip(keys, (3, 4096), strict=True))
    single = jnp.concatenate([jax.jit(head)({"embed": embed}, row[None]) for row in rows])
    assert single.dtype == jnp.float32 and single.shape == (3, 4096)
    np.testing.assert_allclose(single, head({"embed": embed}, rows), atol=1e-4 if dtype == "float32" else 0.3)
    assert jax.jit(head)({"embed": embed}, rows[None, :1]).shape == (1, 1, 4096)


def test_the_former_names_warn_and_do_the_same(folder: Path, tmp_path: Path) -> None:
    model, tokens = ws.load(folder, "float32"), np.arange(3, 15)[None]
    plan = a_plan(model)
    sparse = ws.apply(model, plan)

    def former(name: str) -> Any:
        with pytest.warns(DeprecationWarning, match=f"wisparse_jax.{name} is wisparse_jax.") as caught:
            found = getattr(ws, name)
        assert len(caught) == 1 and name not in ws.__all__
        return found

    assert former("calibrate_to_divergence") is ws.calibrate_to_kl
    former("convert_with_plan")(folder, tmp_path / "out", plan, dtype="float32")
    made = {
        "Llama": former("Llama").from_params(model.config, model.params).with_rules(sparse.rules),
        "SparseLlama": former("SparseLlama")(model.config, model.params, sparse.rules, plan),
        "load_sparse": former("load_sparse")(folder, plan, "float32"),
        "its own plan": former("load_sparse")(tmp_path / "out", dtype="float32"),
        "apply_plans": former("apply_plans")(model, {"a": plan})["a"],
    }
    for name, one in made.items():
        np.testing.assert_array_equal(one(tokens), sparse(tokens), err_msg=name)
        assert (one.plan is None) == (name == "Llama"), name
    config, rngs = tiny_config(), nnx.Rngs(5)
    drawn = former("Llama")(config, rngs), Model.random(config, nnx.Rngs(5))
    jax.tree.map(np.testing.assert_array_equal, *(one.params for one in drawn))
    with pytest.raises(ws.PlanError, match="expected a plan, or a model that was converted together with one"):
        former("load_sparse")(folder)
