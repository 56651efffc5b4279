"""What people have in place of a model folder that can be read: said to be what it is, with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from wisparse_jax.errors import ConfigError, WeightsError, WisparseError
from wisparse_jax.evaluation.windows import read_text
from wisparse_jax.models.checkpoint import convert
from wisparse_jax.models.loading import load, load_tokenizer
from wisparse_jax.models.weights import INDEX, SINGLE
from wisparse_jax.testing.tokenizers import NAMED, write

Edit = Callable[[Path, Callable[[dict[str, np.ndarray]], object]], None]
UP = "model.layers.0.mlp.up_proj"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
INSTEAD = "take the model that it was made from in bfloat16"

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "AWQ": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, f"'awq': AWQ .* {INSTEAD}"),
    "compressed tensors, old": ({"compression_config": {"quant_method": "compressed-tensors"}}, INSTEAD),
    "MLX": (
        {"quantization": {"group_size": 64, "bits": 4}},
        f"quantization = .*'bits': 4.*: quantised MLX checkpoints are not supported; {INSTEAD}",
    ),
    "MLX, both": (
        {"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}},
        f"quantization_config.quant_method = None: quantised MLX .* {INSTEAD}",
    ),
    "a model of images around a Llama": (
        {"model_type": "llava", "text_config": {"model_type": "llama"}},
        "model_type = 'llava', with text_config.model_type = 'llama': .* its text model is, in a checkpoint of its own",
    ),
    "around another": (
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
        "with text_config.model_type = 'gemma3_text': models that read more than text are not supported$",
    ),
    "a rope of another year": (
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
        "rope_type = 'proportional' is not supported; expected one of default, linear, llama3",
    ),
    "rope by axes of an image": (
        {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}, "rope_parameters": None},
        "mrope_section = .* would not be applied",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_of_another_kind(folder: Path, name: str) -> None:
    changes, message = CONFIGS[name]
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_a_quantisation_of_null_is_none(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    none = {"quantization_config": None, "quantization": None, "compression_config": None}
    (folder / "config.json").write_text(json.dumps(raw | none))
    assert load(folder).config.num_blocks == 2


@pytest.mark.parametrize(
    "name",
    [
        *(f"{UP}.qweight", f"{UP}.scales", f"{UP}.g_idx", "lm_head.biases", f"{UP}.weight_scale_inv"),
        *(f"{UP}.weight_packed", f"{UP}.weight.absmax", f"{UP}.SCB", "model.layers.0.self_attn.k_scale"),
    ],
)
def test_tensors_of_quantised_weights_whose_configuration_does_not_say_so(folder: Path, edit: Edit, name: str) -> None:
    edit(folder / SINGLE, lambda tensors: tensors.update({name: np.ones(3, np.float32)}))
    with pytest.raises(WeightsError, match=f"tensor {name} is unexpected; it belongs to quantised weights.*{INSTEAD}"):
        load(folder)


def test_weights_in_eight_bits(folder: Path, edit: Edit) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        name = f"{UP}.weight"
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)

    edit(folder / SINGLE, change)
    with pytest.raises(WeightsError, match=f"found F8_E4M3: quantised weights are not supported; {INSTEAD}"):
        load(folder)


@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter_is_merged_first(folder: Path, beside: bool) -> None:
    """Beside a whole model it would be left out, which transformers adds where peft is installed."""
    if not beside:
        (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    for use in (load, lambda path: convert(path, folder.parent / "out")):
        with pytest.raises(
            ConfigError, match=r"adapter_config\.json: an adapter of 'org/base', not a model: merge both"
        ):
            use(folder)


def test_tensors_of_an_adapter(folder: Path, edit: Edit) -> None:
    name = f"base_model.model.{UP}.lora_A.weight"
    edit(folder / SINGLE, lambda tensors: tensors.update({name: np.ones(3, np.float32)}))
    with pytest.raises(WeightsError, match=f"tensor {name} is unexpected; it belongs to an adapter"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("m.Q4_K_M.gguf", "make a model folder of m.Q4_K_M.gguf first: wisparse convert"),
        ("params.json", "its params.json is the makers' own format: take the model in Hugging Face format"),
        ("model.safetensors", "a model folder holds a config.json"),
    ],
)
def test_a_folder_without_a_configuration(tmp_path: Path, file: str, advice: str) -> None:
    (tmp_path / file).write_text("")
    with pytest.raises(ConfigError, match=f"config.json: no such file; {advice}"):
        load(tmp_path)


PARTS = (SINGLE, "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.mark.parametrize("part", PARTS)
def test_a_pointer_of_git_lfs_in_place_of_a_file(folder: Path, part: str) -> None:
    write(folder, "byte level", "<s> $A", NAMED, family=None)
    (folder / part).write_text(POINTER)
    with pytest.raises(WisparseError, match=f"{part}: a Git LFS pointer, not the file itself; .* git lfs pull"):
        load_tokenizer(folder) if "tokenizer" in part else load(folder)


@pytest.mark.parametrize("part", [*PARTS, INDEX])
def test_a_link_of_the_hubs_cache_that_points_nowhere(folder: Path, shard: Callable[[Path], Path], part: str) -> None:
    write(folder, "byte level", "<s> $A", NAMED, family=None)
    if part == INDEX:
        shard(folder)
    (folder / part).unlink(missing_ok=True)
    (folder / part).symlink_to("../../blobs/0f3c")
    with pytest.raises(WisparseError, match=rf"{part}: a link to \.\./\.\./blobs/0f3c, which is not there"):
        load_tokenizer(folder) if "tokenizer" in part else load(folder)


def test_a_shard_and_a_gguf_file_that_are_not_there(folder: Path, shard: Callable[[Path], Path]) -> None:
    shard(folder)
    name = "model-00002-of-00002.safetensors"
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/0f3c")
    with pytest.raises(WeightsError, match=f"{name}: a link to .*, which is not there"):
        load(folder)
    (folder / name).unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises(WeightsError, match=f"{name}: a Git LFS pointer"):
        load(folder)
    (folder / "m.gguf").write_text(POINTER)
    with pytest.raises(WisparseError, match=r"m\.gguf: a Git LFS pointer"):
        convert(folder / "m.gguf", folder / "out")


def test_a_text_that_is_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(POINTER)
    with pytest.raises(WisparseError, match=r"text\.txt: a Git LFS pointer"):
        read_text(tmp_path / "text.txt")
    shutil.copyfile(__file__, tmp_path / "text.txt")
    assert "that is a pointer" in read_text(tmp_path / "text.txt")
