"""Checkpoints of kinds that are not read here: what they are, and what to do instead."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from wisparse_jax.errors import ConfigError
from wisparse_jax.files import read_json, shown

ADAPTER = "adapter_config.json"
UNROUNDED = (
    "take the model that it was made from in bfloat16 (and --weights int8 for smaller weights), or a GGUF file of it: "
    "wisparse convert FILE.gguf OUT"
)
_METHODS = {"awq": "AWQ", "gptq": "GPTQ", "fp8": "FP8", "fbgemm_fp8": "FP8", "mxfp4": "MXFP4", "modelopt": "ModelOpt"}
_METHODS |= {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors", "torchao": "torchao"}
# What quantised layers store beside or in place of a weight.
_QUANTISED = re.compile(
    r"(qweight|qzeros|g_idx|scales|biases|weight_scale(_inv|_2)?|weight_packed|weight_shape|weight_zero_point|"
    r"weight_global_scale|input_(scale|global_scale)|SCB|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|"
    r"quant_state\..*|SCB)|[kv]_scale|trellis|suh|svh)$"
)


def refuse_other_kinds(raw: dict[str, Any], families: tuple[str, ...]) -> None:
    """Refuse the config.json of quantised weights, or of a model around a text model.

    Raises:
        ConfigError: names the field, its value, and what to do.
    """
    for field in ("quantization_config", "compression_config"):
        if (settings := raw.get(field)) is not None:
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            kind = _METHODS.get(method, "quantised") if isinstance(method, str) else "quantised"
            if method is None and isinstance(settings, dict) and {"bits", "group_size"} <= settings.keys():
                kind = "quantised MLX"
            raise ConfigError(
                f"{field}.quant_method = {shown(method)}: {kind} checkpoints are not supported; {UNROUNDED}"
            )
    if (settings := raw.get("quantization")) is not None:
        raise ConfigError(f"quantization = {shown(settings)}: quantised MLX checkpoints are not supported; {UNROUNDED}")
    text, family = raw.get("text_config"), raw.get("model_type")
    if family not in families and isinstance(text, dict):
        inner = text.get("model_type")
        advice = "; its text model is, in a checkpoint of its own" if inner in families else ""
        raise ConfigError(
            f"model_type = {shown(family)}, with text_config.model_type = {shown(inner)}: models that read more than "
            f"text are not supported{advice}"
        )


def refuse_other_folders(folder: Path) -> None:
    """Refuse a folder of an adapter, or one without a config.json by what it has instead.

    Raises:
        ConfigError: names the file, and what to do.
    """
    if os.path.lexists(folder / ADAPTER):
        base = read_json(folder / ADAPTER, dict[str, Any], ConfigError).get("base_model_name_or_path")
        raise ConfigError(
            f"{folder / ADAPTER}: an adapter of {shown(base)}, not a model: merge both first, with peft: "
            "PeftModel.from_pretrained(model, FOLDER).merge_and_unload().save_pretrained(OUT)"
        )
    if os.path.lexists(folder / "config.json"):
        return
    advice = "a model folder holds a config.json"
    names = sorted(path.name for path in folder.iterdir())
    if files := [name for name in names if name.endswith(".gguf")]:
        advice = f"make a model folder of {files[0]} first: wisparse convert {folder / files[0]} OUT"
    elif "params.json" in names:
        advice = "its params.json is the makers' own format: take the model in Hugging Face format"
    raise ConfigError(f"{folder / 'config.json'}: no such file; {advice}")


def of_other_kinds(tensor: str) -> str:
    """What the name of a tensor that should not be there says, for a message; nothing for most."""
    if ".lora_" in tensor or tensor.startswith("base_model."):
        return "it belongs to an adapter, which is merged into its model first"
    if _QUANTISED.search(tensor):
        return f"it belongs to quantised weights, which are not supported: {UNROUNDED}"
    return ""
