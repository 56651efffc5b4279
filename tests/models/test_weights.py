"""Import of Hugging Face weights: what is read, and what is refused with which message."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from wisparse_jax.errors import WeightsError, WisparseError
from wisparse_jax.models import weights
from wisparse_jax.models.config import parse_config, read_config
from wisparse_jax.models.fingerprint import SAMPLES, fingerprint, flat, model_fingerprint, sample
from wisparse_jax.models.loading import load
from wisparse_jax.models.parameters import hf_name, param_shapes
from wisparse_jax.models.weights import place

Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EMBED = "model.embed_tokens.weight"
SHARD = "model-00001-of-00002.safetensors"  # holds Q after the fixture has split the model
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 96, (2, 12)), jnp.int32)
Edit = Callable[[Path, Callable[[dict[str, np.ndarray]], object]], None]
Shard = Callable[[Path], Path]


def same(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


def set_last(tensors: dict[str, np.ndarray], name: str, value: float) -> None:
    """Set the last column of a tensor."""
    tensors[name] = tensors[name].copy()
    tensors[name][..., -1] = value


def test_orientation_names_and_dtype(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    params = load(folder, dtype="float32").params
    np.testing.assert_array_equal(params["blocks"][1]["q"]["kernel"], stored[Q].T.astype(np.float32))
    np.testing.assert_array_equal(params["embed"], stored[EMBED].astype(np.float32))
    np.testing.assert_array_equal(params["lm_head"], stored["lm_head.weight"].T.astype(np.float32))
    np.testing.assert_array_equal(params["blocks"][0]["attn_norm"], stored[NORM].astype(np.float32))
    shapes = param_shapes(read_config(folder))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)


def test_every_parameter_of_every_family_has_a_name_of_its_own() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 12}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        raw = {"model_type": family, "vocab_size": 8, "attention_bias": True, "mlp_bias": True, **sizes}
        paths = list(flat(param_shapes(parse_config(raw))))
        names = {hf_name(path) for path in paths}
        assert len(names) == len(paths)
        assert "model.layers.11.mlp.down_proj.weight" in names


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(folder: Path, dtype: str) -> None:
    model = load(folder, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(dtype)}
    assert model(TOKENS).dtype == jnp.float32


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_stored_dtypes_load_alike(folder: Path, edit: Edit, stored: Any) -> None:
    reference = load(folder, dtype="float32")
    if stored == np.float16:  # exact in both
        edit(folder / "model.safetensors", lambda t: t.update({k: v.astype(np.float16) for k, v in t.items()}))
        reference = load(folder, dtype="float32")
    edit(folder / "model.safetensors", lambda t: t.update({k: v.astype(stored) for k, v in t.items()}))
    assert same(load(folder, dtype="float32").params, reference.params)


def test_default_dtype_is_that_of_the_device(folder: Path) -> None:
    expected = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    assert load(folder).dtype == expected
    with pytest.raises(WisparseError, match="dtype = 'int8': expected one of float32, bfloat16, float16"):
        load(folder, dtype="int8")


def test_shards_load_as_the_single_file(folder: Path, shard: Shard) -> None:
    single = load(folder)
    shard(folder)
    sharded = load(folder)
    assert same(single.params, sharded.params)
    assert model_fingerprint(single) == model_fingerprint(sharded)


def test_a_snapshot_of_links_out_of_the_folder_is_read(folder: Path, tmp_path: Path, shard: Shard) -> None:
    shard(folder)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    assert load(snapshot)(TOKENS).shape == (2, 12, 96)


def test_old_rotary_buffers_are_ignored(folder: Path, edit: Edit) -> None:
    before = load(folder)
    edit(folder / "model.safetensors", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": t[NORM]}))
    assert same(load(folder).params, before.params)


def test_a_tied_model_takes_a_head_that_is_its_embedding(tied: Path, edit: Edit, shard: Shard) -> None:
    before = load(tied)
    edit(tied / "model.safetensors", lambda t: t.update({"lm_head.weight": t[EMBED]}))
    assert "lm_head" not in load(tied).params
    index = shard(tied)
    assert same(load(tied).params, before.params)
    file = tied / json.loads(index.read_text())["weight_map"]["lm_head.weight"]
    edit(file, lambda t: set_last(t, "lm_head.weight", 0.5))
    with pytest.raises(WeightsError, match=f"{file.name}: tensor lm_head.weight differs from {EMBED}: .* tie_word_emb"):
        load(tied)


@pytest.mark.parametrize("ahead", [0, 40_000, 1 << 30])
def test_the_first_bad_tensor_is_the_one_that_is_named(
    folder: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """However many are read ahead, and whatever is wrong with a later one."""
    monkeypatch.setattr(weights, "AHEAD", ahead)
    file = folder / "model.safetensors"
    edit(file, lambda t: (t.pop("model.norm.weight"), t.update({"model.zzz.weight": t[NORM]})))
    with pytest.raises(WeightsError, match=r"model\.zzz\.weight is unexpected"):
        load(folder)
    edit(file, lambda t: t.update({Q: t[Q][:-1]}))
    with pytest.raises(WeightsError, match=f"{Q}: expected shape"):
        load(folder)
    edit(file, lambda t: set_last(t, "model.layers.1.mlp.up_proj.weight", np.nan))
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj\.weight is not finite"):
        load(folder)
    edit(file, lambda t: set_last(t, NORM, 1e6))
    with pytest.raises(WeightsError, match=f"{NORM} does not fit"):
        load(folder, dtype="float16")


TENSOR_DAMAGE: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]] = {
    "missing": (lambda t: t.pop(Q), f"model: tensor {Q} is missing (1 in all); searched model.safetensors"),
    "untied without a head": (lambda t: t.pop("lm_head.weight"), "tensor lm_head.weight is missing"),
    "unexpected": (
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[NORM]}),
        "model.safetensors: tensor model.layers.2.mlp.up_proj.weight is unexpected",
    ),
    "bias where there is none": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[NORM]}),
        "model.safetensors: tensor model.layers.0.self_attn.q_proj.bias is unexpected",
    ),
    "mis-shaped": (
        lambda t: t.update({Q: t[Q][:-1]}),
        f"model.safetensors: tensor {Q}: expected shape [64, 64], found [63, 64]",
    ),
    "transposed": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"].T.copy()}),
        "tensor model.layers.0.mlp.up_proj.weight: expected shape [88, 64], found [64, 88]",
    ),
    "another rank": (lambda t: t.update({NORM: t[NORM][None]}), f"{NORM}: expected shape [64], found [1, 64]"),
    "int8": (
        lambda t: t.update({Q: np.ones((64, 64), np.int8)}),
        f"model.safetensors: tensor {Q}: expected dtype BF16, F16, F32, found I8",
    ),
    "float64": (lambda t: t.update({Q: np.ones((64, 64))}), f"{Q}: expected dtype BF16, F16, F32, found F64"),
    "NaN": (lambda t: set_last(t, Q, np.nan), f"model.safetensors: tensor {Q} is not finite"),
    "infinity": (lambda t: set_last(t, EMBED, -np.inf), f"model.safetensors: tensor {EMBED} is not finite"),
}


@pytest.mark.parametrize("case", TENSOR_DAMAGE)
def test_damaged_tensors_are_refused(folder: Path, edit: Edit, case: str) -> None:
    change, message = TENSOR_DAMAGE[case]
    edit(folder / "model.safetensors", change)
    with pytest.raises(WeightsError, match=re.escape(message)) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_a_value_beyond_the_range_of_float16_is_refused(folder: Path, edit: Edit) -> None:
    edit(folder / "model.safetensors", lambda t: set_last(t, Q, 1e6))
    load(folder, dtype="bfloat16")
    with pytest.raises(WeightsError, match=rf"tensor {Q} does not fit: found values beyond the range of float16"):
        load(folder, dtype="float16")


FILE_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-100],
    "truncated in the header": lambda data: data[:50],
    "empty": lambda data: b"",
    "garbage": lambda data: b"\x80\x02" + os.urandom(1000),
    "a web page": lambda data: b"<!doctype html><html></html>" * 10,
}


@pytest.mark.parametrize("case", FILE_DAMAGE)
def test_damaged_files_are_refused(folder: Path, case: str) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(FILE_DAMAGE[case](file.read_bytes()))
    with pytest.raises(WeightsError, match=re.escape(f"{file}: not readable as safetensors")):
        load(folder)


def test_a_header_that_lists_a_million_tensors_is_refused_at_once(folder: Path) -> None:
    file = folder / "model.safetensors"
    with open(file, "wb") as out:
        out.write((90 << 20).to_bytes(8, "little"))
        out.truncate(1 << 40)
    with pytest.raises(WeightsError, match=re.escape(f"{file}: a header of 94,371,840 bytes: expected at most 16,777")):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_pipes_are_refused(folder: Path, shard: Shard, name: str) -> None:
    if name != "model.safetensors":
        shard(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(WeightsError, match=re.escape(f"{folder / name}: not a regular file")):
        load(folder)


def test_an_index_may_list_constants_that_nobody_stored(folder: Path, shard: Shard) -> None:
    index = shard(folder)
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = SHARD
    index.write_text(json.dumps(raw))
    assert load(folder).config.num_blocks == 2


INDEX_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no weight_map": (lambda raw: raw.pop("weight_map"), "weight_map: expected a value, found nothing"),
    "empty weight_map": (lambda raw: raw["weight_map"].clear(), "weight_map: .* found an empty object"),
    "weight_map a list": (lambda raw: raw.update(weight_map=[1]), r"weight_map = \[1\]: expected an object"),
    "absolute": (
        lambda raw: raw["weight_map"].update({Q: "/etc/x.safetensors"}),
        f"{Q}: .* found '/etc/x.safetensors'",
    ),
    "parent": (
        lambda raw: raw["weight_map"].update({Q: "../model.safetensors"}),
        f"{Q}: expected the name of a .safetensors file in the folder, found '../model.safetensors'",
    ),
    "parent inside": (lambda raw: raw["weight_map"].update({Q: "a/../../x.safetensors"}), f"{Q}: .* found 'a/"),
    "drive": (lambda raw: raw["weight_map"].update({Q: "C:\\x.safetensors"}), f"{Q}: .* found 'C:"),
    "not a name": (lambda raw: raw["weight_map"].update({Q: 3}), f"{Q} = 3: expected a string"),
    "pickle": (lambda raw: raw["weight_map"].update({Q: "pytorch_model.bin"}), f"{Q}: .* found 'pytorch_model.bin'"),
    "no such shard": (
        lambda raw: raw["weight_map"].update({Q: "model-3.safetensors"}),
        f"model-3.safetensors: no such file; .* says that it holds tensor {Q}",
    ),
    "not in its shard": (
        lambda raw: raw["weight_map"].update({EMBED: SHARD}),
        f"{SHARD}: tensor {EMBED} is missing; .* says that it is in this file",
    ),
    "not in the index": (
        lambda raw: raw["weight_map"].pop(Q),
        f"{SHARD}: tensor {Q} is unexpected; .* does not list it here",
    ),
}


@pytest.mark.parametrize("case", INDEX_DAMAGE)
def test_damaged_indices_are_refused(folder: Path, shard: Shard, case: str) -> None:
    index = shard(folder)
    raw = json.loads(index.read_text())
    assert raw["weight_map"][Q] == SHARD
    change, message = INDEX_DAMAGE[case]
    change(raw)
    index.write_text(json.dumps(raw))
    with pytest.raises(WeightsError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b""])
def test_an_index_that_is_not_json_is_refused(folder: Path, shard: Shard, text: bytes) -> None:
    index = shard(folder)
    index.write_bytes(text)
    with pytest.raises(WeightsError, match=re.escape(f"{index}: not readable as JSON")):
        load(folder)


def test_a_truncated_shard_is_refused(folder: Path, shard: Shard) -> None:
    file = shard(folder).with_name(SHARD)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=f"{SHARD}: not readable as safetensors"):
        load(folder)


class Bomb:
    def __reduce__(self) -> Any:
        return (os.abort, ())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_opened(folder: Path, name: str) -> None:
    import pickle

    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(WeightsError, match=rf"found only {name}: pickle files are never opened"):
        load(folder)


def test_a_pickle_under_another_name_is_refused(folder: Path) -> None:
    import pickle

    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(WeightsError, match="not readable as safetensors"):
        load(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no weights: expected model\.safetensors or .*index.json, found neither"):
        load(folder)


def test_fingerprint_is_of_the_checkpoint(folder: Path, edit: Edit) -> None:
    models = [load(folder, dtype=dtype) for dtype in ("float32", "bfloat16", "float16")]
    names = {model_fingerprint(model) for model in models}
    assert len(names) == 1
    assert re.fullmatch("[0-9a-f]{64}", names.pop())
    for model in models[:2]:  # from the parameters alone
        assert fingerprint(model.config, model.params) == model_fingerprint(model)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "eos_token_id": 5}))
    assert model_fingerprint(load(folder)) == model_fingerprint(models[0])
    (folder / "config.json").write_text(json.dumps({**raw, "rope_theta": 1e4}))
    assert model_fingerprint(load(folder)) != model_fingerprint(models[0])
    (folder / "config.json").write_text(json.dumps(raw))
    edit(folder / "model.safetensors", lambda t: set_last(t, NORM, 0.5))
    assert model_fingerprint(load(folder)) != model_fingerprint(models[0])


def test_fingerprint_of_a_float32_checkpoint_does_not_depend_on_the_dtype(folder: Path, edit: Edit) -> None:
    rng = np.random.default_rng(0)
    edit(
        folder / "model.safetensors",
        lambda t: t.update({k: rng.standard_normal(v.shape).astype(np.float32) for k, v in t.items()}),
    )
    models = [load(folder, dtype=dtype) for dtype in ("float32", "bfloat16")]
    assert len({fingerprint(m.config, m.params) for m in models} | {model_fingerprint(m) for m in models}) == 1


@pytest.mark.parametrize("shape", [(1,), (3,), (64,), (100,), (7, 11), (64, 64), (128, 96)])
def test_samples_run_from_the_first_element_to_the_last(shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape))
    values = sample(np.arange(size, dtype=np.float32).reshape(shape) / 256).astype(np.float32)
    assert len(values) == min(SAMPLES, size)
    assert values[0] == 0
    assert abs(values[-1] * 256 - (size - 1)) <= size / 128
    assert np.all(np.diff(values) >= 0)


@pytest.mark.parametrize("fixture", ["folder", "tied"])
def test_tensors_of_a_model_without_its_head_have_no_prefix(
    fixture: str, request: pytest.FixtureRequest, edit: Any
) -> None:
    """As base models are stored, with old constants; the values are the same."""
    path = request.getfixturevalue(fixture)
    expected = load(path)

    def strip(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    edit(path / "model.safetensors", strip)
    found = load(path)
    assert found.fingerprint == expected.fingerprint
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found.params, expected.params))


def test_a_tensor_with_and_without_its_prefix_is_refused(folder: Path, edit: Any) -> None:
    edit(folder / "model.safetensors", lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"]}))
    with pytest.raises(WeightsError, match=r"tensor norm\.weight is unexpected; there is another of it"):
        load(folder)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_number_that_is_none_is_seen_wherever_it_stands(dtype, bad):
    """XLA's maximum of floats passes NaN by on a CPU, in arrays of some sizes."""
    for size in (1, 31, 64, 129):
        for at in (0, size, size * size - 1):
            stored = np.ones((size, size), dtype)
            stored.flat[min(at, stored.size - 1)] = bad
            with pytest.raises(WeightsError, match="a tensor is not finite"):
                place(stored, "float32", True, "a tensor")
