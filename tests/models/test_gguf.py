"""GGUF files written here, as llama.cpp lays them out, become the models that they were made of."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from wisparse_jax.cli import main
from wisparse_jax.errors import ConfigError, WeightsError, WisparseError
from wisparse_jax.models.checkpoint import convert
from wisparse_jax.models.config import parse_config
from wisparse_jax.models.fingerprint import model_fingerprint
from wisparse_jax.models.gguf import GgufFile
from wisparse_jax.models.gguf_config import end_tokens, hf_config
from wisparse_jax.models.loading import load, load_tokenizer
from wisparse_jax.models.parameters import flat

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 96, (2, 12)), jnp.int32)
PRINTABLE = [chr(i) for i in range(33, 33 + 88)]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BYTE_LEVEL: dict[str, Any] = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": ["<unk>", "<s>", "</s>", "<think>", *PRINTABLE, "ab", "Ġ", "Ċ", "Ġab"],
    "token_type": [3, 3, 3, 4, *[1] * 92],
    "merges": ["a b", "Ġ ab"],
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: feature i of a head, then feature i of its second half."""
    size = len(rows) // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def write(
    path: Path,
    variant: str = "llama2",
    tokenizer: dict[str, Any] | None = None,
    quantise: gguf.GGMLQuantizationType | None = None,
    change: Callable[[dict[str, np.ndarray]], object] = lambda tensors: None,
    **metadata: Any,
) -> Path:
    """A GGUF file of a parity model, by the gguf library's own writer; `metadata` without the architecture's name."""
    config = json.loads((PARITY / variant / "config.json").read_text())
    family = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters") or {**config, **(config.get("rope_scaling") or {})}
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", family))
    values = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": rope.get("rope_theta", 10000.0),
    } | metadata
    if "head_dim" in config:
        values |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    if rope.get("rope_type", rope.get("type")) == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    for key, value in values.items():
        if value is None:
            continue
        adds = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool}
        add = adds.get(type(value), writer.add_uint32)
        add(key if key.startswith(("split.", "general.")) else f"{family}.{key}", value)
    for key, value in (BYTE_LEVEL if tokenizer is None else tokenizer).items():
        name = f"tokenizer.{key}" if key.startswith("chat") else f"tokenizer.ggml.{key}"
        add = {list: writer.add_array, str: writer.add_string, bool: writer.add_bool}.get(
            type(value), writer.add_uint32
        )
        add(name, value)
    tensors = {}
    for name, value in load_file(PARITY / variant / "model.safetensors").items():
        stem, kind = name.rsplit(".", 1)
        if stem in TOP:
            new = TOP[stem]
        else:
            _, _, block, layer = stem.split(".", 3)
            new = f"blk.{block}.{NAMES[layer]}"
            if family == "llama" and NAMES[layer] in ("attn_q", "attn_k"):
                value = interleaved(value, heads if NAMES[layer] == "attn_q" else kv_heads)
        tensors[f"{new}.{kind}"] = np.asarray(value, np.float32)
    change(tensors)
    for name, value in tensors.items():
        if quantise is not None and value.ndim == 2 and value.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(value, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "variant", ["llama2", "llama-biases", "llama-head-dim", "llama-linear-rope", "smollm2", "qwen2.5", "qwen3"]
)
def test_a_file_is_the_model_that_it_was_made_of(tmp_path: Path, variant: str, capsys: pytest.CaptureFixture) -> None:
    """Bit for bit; and one plan fits both, as the fingerprints are the same."""
    file = write(tmp_path / "m.gguf", variant)
    main(["convert", str(file), str(tmp_path / "out")])
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    original, made = load(PARITY / variant, dtype="float32"), load(tmp_path / "out", dtype="float32")
    np.testing.assert_array_equal(original(TOKENS), made(TOKENS))
    assert model_fingerprint(original) == model_fingerprint(made)
    assert made.config == original.config


def llama3_factors(factor: float) -> np.ndarray:
    """What llama.cpp divides Llama 3's rotary frequencies by, pair by pair."""
    factors = []
    for i in range(8):
        wavelength = 2 * math.pi * 500000.0 ** (2 * i / 16)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(factors, np.float32)


def test_llama3_rope_factors_become_its_rule(tmp_path: Path) -> None:
    folder = shutil.copytree(PARITY / "llama3.2", tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_parameters"]["original_max_position_embeddings"] = 8192
    (folder / "config.json").write_text(json.dumps(raw))
    factors = llama3_factors(32.0)
    assert 1 < factors[4] < 32
    file = write(tmp_path / "m.gguf", "llama3.2", change=lambda t: t.update({"rope_freqs.weight": factors}))
    convert(file, tmp_path / "out")
    assert load(tmp_path / "out").config == load(folder).config


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_stored_values_are_dequantised(tmp_path: Path, kind: str) -> None:
    """Within half a step of each block of 32, and bfloat16; what is not quantised keeps its own dtype."""
    quantised = gguf.GGMLQuantizationType[kind]
    convert(write(tmp_path / "m.gguf", "llama2", quantise=quantised), tmp_path / "out")
    made, original = load(tmp_path / "out", "float32").params, load(PARITY / "llama2", "float32").params
    stored = json.loads((tmp_path / "out" / "wisparse.json").read_text())["tensors"]
    assert stored["embed"]["dtype"] == ("float16" if kind == "F16" else "bfloat16")
    assert stored["norm"]["dtype"] == "float32"
    for a, b in (
        (made["embed"], original["embed"]),
        (made["blocks"][1]["q"]["kernel"].T, original["blocks"][1]["q"]["kernel"].T),
    ):
        blocks, exact = np.asarray(a).reshape(-1, 32), np.asarray(b).reshape(-1, 32)
        largest = abs(exact).max(axis=1, keepdims=True)
        # Q4_0 cuts the extreme of the other sign off by up to one step.
        step = {"Q8_0": largest / 127, "Q4_0": 2 * largest / 8, "F16": largest * 2.0**-10}[kind]
        assert (abs(blocks - exact) <= step / 2 * 1.01 + largest * 2.0**-8).all()
        assert kind == "F16" or (blocks != exact).any()


PIECES = {
    "gpt-2": ["it", "'s", "Ġ12345", "ĊĊ", "Ġx", "Ġ!?"],
    "smollm": ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "ĊĊ", "Ġx", "Ġ!?"],
    "llama-bpe": ["it", "'s", "Ġ", "123", "45", "ĊĊ", "Ġx", "Ġ!?"],
    "qwen2": ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "ĊĊ", "Ġx", "Ġ!?"],
    "tekken": ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "ĊĊ", "Ġx", "Ġ!?"],
}


@pytest.mark.parametrize("rule", PIECES)
def test_texts_are_cut_as_the_vocabulary_was_made(tmp_path: Path, rule: str) -> None:
    convert(write(tmp_path / "m.gguf", tokenizer=BYTE_LEVEL | {"pre": rule}), tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    pieces = tokenizer.inner.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's 12345\n\n x !?")
    assert [piece for piece, _ in pieces] == PIECES[rule]
    # llama.cpp puts BOS before a text of these two kinds although the file does not say so.
    assert (tokenizer.encode("ab")[0] == 1) == (rule in ("llama-bpe", "tekken"))
    tokens = BYTE_LEVEL["tokens"]
    ids = tokenizer.encode("</s>ab<think> ab\n", bos=False)
    assert [tokens[i] for i in ids] == ["</s>", "ab", "<think>", "Ġab", "Ċ"]
    assert tokenizer.decode(ids) == "ab<think> ab\n"


def test_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    """Merges by score; bytes of what the vocabulary lacks; BOS and a space before a text."""
    pieces = {
        "▁": -6.0,
        "h": -7.0,
        "e": -8.0,
        "y": -9.0,
        "he": -1.0,
        "▁he": -2.0,
        "ey": -0.5,
        "▁hey": -3.0,
        "hey": -4.0,
    }
    tokens = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", *pieces]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), 96)]
    scores = [0.0] * 5 + [*pieces.values()] + [0.0] * (91 - len(pieces))
    kinds = [2, 3, 3, 6, 6, *[1] * len(pieces), *[5] * (91 - len(pieces))]
    tokenizer = BYTE_LEVEL | {"model": "llama", "tokens": tokens, "scores": scores, "token_type": kinds}
    tokenizer |= {"unknown_token_id": 0, "add_eos_token": False}
    convert(write(tmp_path / "m.gguf", tokenizer=tokenizer), tmp_path / "out")
    made = load_tokenizer(tmp_path / "out")
    # The best score merges first: e + y, then h + ey before ▁ + he can come.
    assert [tokens[i] for i in made.encode("hey")] == ["<s>", "▁hey"]
    assert [tokens[i] for i in made.encode("he é")] == ["<s>", "▁he", "▁", "<0xC3>", "<0xA9>"]
    assert made.decode(made.encode("he é")) == "he é"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16", "F32"])
def test_in_float32_values_are_exactly_those_that_the_gguf_library_dequantises(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path / "m.gguf", "qwen2.5", quantise=gguf.GGMLQuantizationType[kind])
    convert(file, tmp_path / "exact", dtype="float32")
    convert(file, tmp_path / "out")
    made, narrow = load(tmp_path / "exact", "float32").params, load(tmp_path / "out", "float32").params
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, a, b in (
        ("token_embd.weight", made["embed"], narrow["embed"]),
        ("blk.1.ffn_up.weight", made["blocks"][1]["up"]["kernel"].T, narrow["blocks"][1]["up"]["kernel"].T),
    ):
        expected = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).astype(np.float32)
        np.testing.assert_array_equal(a, expected)
        # Without a dtype a quantised tensor is rounded to bfloat16.
        rounded = expected if kind in ("F16", "F32") else jnp.asarray(expected, jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(b, rounded)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
@pytest.mark.parametrize(("weights", "head"), [("int8", None), ("int4", "int8")])
def test_what_is_rounded_to_integers_is_rounded_from_the_exact_values(
    tmp_path: Path, kind: str, weights: str, head: str | None
) -> None:
    """As the exact model is; what is not rounded is kept as without rounding, whatever it was read as."""
    file = write(tmp_path / "m.gguf", "llama-biases", quantise=gguf.GGMLQuantizationType[kind])
    convert(file, tmp_path / "exact", dtype="float32")
    convert(file, tmp_path / "plain")
    convert(file, tmp_path / "made", weights, head)
    expected = flat(load(tmp_path / "exact", "float32", weights, head=head).params)
    made = flat(load(tmp_path / "made", "float32").params)
    plain = flat(load(tmp_path / "plain", "float32").params)
    assert made.keys() == expected.keys()
    integers = {path for path in made if path.endswith(".scale")} | {p for p, v in made.items() if v.dtype == jnp.int8}
    integers |= {path for path, value in made.items() if value.dtype == jnp.uint8}
    assert len(integers) == 2 * (2 * 7 + (head is not None))
    for path, value in made.items():
        np.testing.assert_array_equal(value, (expected if path in integers else plain)[path], err_msg=path)
    stored, before = (
        json.loads((tmp_path / name / "wisparse.json").read_text())["tensors"] for name in ("made", "plain")
    )
    assert all(stored[path]["dtype"] == before[path]["dtype"] for path in stored.keys() - integers)


def test_a_head_is_rounded_from_an_exact_embedding_that_is_kept_in_bfloat16(tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", "smollm2", quantise=gguf.GGMLQuantizationType["Q8_0"])
    convert(file, tmp_path / "exact", dtype="float32")
    convert(file, tmp_path / "made", head="int8")
    exact, made = load(tmp_path / "exact", "float32", head="int8").params, load(tmp_path / "made").params
    np.testing.assert_array_equal(made["lm_head"]["kernel"], exact["lm_head"]["kernel"])
    np.testing.assert_array_equal(made["lm_head"]["scale"], exact["lm_head"]["scale"])
    tensors = json.loads((tmp_path / "made" / "wisparse.json").read_text())["tensors"]
    assert tensors["embed"]["dtype"] == tensors["blocks.0.q.kernel"]["dtype"] == "bfloat16"


ROPES: dict[str, tuple[dict[str, Any], float]] = {
    "nothing": ({}, 1.0),
    "a factor without a type is linear": ({"rope.scaling.factor": 4.0}, 4.0),
    "the old name": ({"rope.scale_linear": 4.0}, 4.0),
    "the old name beside the new one": ({"rope.scale_linear": 4.0, "rope.scaling.factor": 2.0}, 2.0),
    "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
    "none": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1.0),
    "0 stands for 1": ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, 1.0),
    "linear without a factor": ({"rope.scaling.type": "linear"}, 1.0),
}


@pytest.mark.parametrize("name", ROPES)
def test_positions_are_scaled_as_llama_cpp_does(tmp_path: Path, name: str) -> None:
    keys, factor = ROPES[name]
    rope = parse_config(hf_config(GgufFile(write(tmp_path / "m.gguf", **keys)))).rope
    plain = parse_config(hf_config(GgufFile(write(tmp_path / "plain.gguf")))).rope
    np.testing.assert_allclose(rope.frequencies(16) * factor, plain.frequencies(16), rtol=1e-6)


NEUTRAL: dict[str, Any] = {
    "attention.sliding_window": 256,
    "attention.scale": 0.25,
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
    "logit_scale": 1.0,
    "embedding_scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "expert_count": 0,
    "use_parallel_residual": False,
    "vocab_size": 96,
    "tensor_data_layout": "Meta AI original pth",
    "rope.scaling.original_context_length": 128,
    "general.type": "model",
}


def test_what_is_no_model_is_not_called_an_adapter(tmp_path: Path) -> None:
    kind: dict[str, Any] = {"general.type": "mmproj"}
    with pytest.raises(ConfigError, match=r"general\.type = 'mmproj': expected a model$"):
        hf_config(GgufFile(write(tmp_path / "m.gguf", **kind)))


def test_tokens_that_llama_cpp_never_chooses_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", tokenizer=BYTE_LEVEL | {"suppress_tokens": [3]})
    with pytest.raises(
        ConfigError, match=r"tokenizer\.ggml\.suppress_tokens = \[3\] is not supported; expected no such"
    ):
        hf_config(GgufFile(file))


CHANGING: dict[str, Any] = {
    "attention.sliding_window": 16,
    "attention.scale": 0.3,
    "attention.causal": False,
    "attention.clamp_kqv": 8.0,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rope.scaling.attn_factor": 1.2,
    "rope.scaling.yarn_ext_factor": 1.0,
    "logit_scale": 0.0625,
    "embedding_scale": 12.0,
    "residual_scale": 0.22,
    "pooling_type": 3,
    "a_key_of_next_year": "x",
}


def test_keys_of_the_architecture_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    assert hf_config(GgufFile(write(tmp_path / "m.gguf", **NEUTRAL))) == hf_config(
        GgufFile(write(tmp_path / "plain.gguf"))
    )


@pytest.mark.parametrize("key", CHANGING)
def test_keys_of_the_architecture_that_change_what_is_computed_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"llama.{key} = ") + ".*is not supported; expected"):
        hf_config(GgufFile(write(tmp_path / "m.gguf", **{key: CHANGING[key]})))


@pytest.mark.parametrize("key", ["context_length", "attention.layer_norm_rms_epsilon", "feed_forward_length"])
def test_a_key_that_llama_cpp_needs_is_not_guessed(tmp_path: Path, key: str) -> None:
    without: dict[str, Any] = {key: None}
    with pytest.raises(ConfigError, match=re.escape(f"llama.{key}: expected a value, found nothing")):
        hf_config(GgufFile(write(tmp_path / "m.gguf", **without)))


def with_tokens(*texts: str, kind: int = 3, **keys: int) -> dict[str, Any]:
    """The vocabulary with other tokens from the fifth on, of one kind."""
    tokens, kinds = [*BYTE_LEVEL["tokens"]], [*BYTE_LEVEL["token_type"]]
    tokens[4 : 4 + len(texts)], kinds[4 : 4 + len(texts)] = texts, [kind] * len(texts)
    return BYTE_LEVEL | {"tokens": tokens, "token_type": kinds, "merges": ["a b"]} | keys


ENDS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "Qwen without an end of a turn": (with_tokens("<|endoftext|>", "<|im_end|>", eos_token_id=4), [4, 2, 5]),
    "a key first": (with_tokens("<|endoftext|>", "<|im_end|>", eos_token_id=4, eot_token_id=7), [4, 7, 2, 5]),
    "Llama 3": (with_tokens("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", eos_token_id=6), [6, 2, 4, 5]),
    "Gemma's": (with_tokens("<end_of_turn>"), [2, 4]),
    "files of code": (with_tokens("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"), [2, 4, 5, 6]),
    "an end of a part": (with_tokens("<|end|>", "<|return|>", "<|call|>"), [2, 5, 6]),
    "an end of a message": (with_tokens("<|end|>", "<|return|>"), [2, 4, 5]),
    "a part that eos names": (with_tokens("<|end|>", "<|return|>", "<|calls|>", eos_token_id=4), [2, 5, 6]),
    "Gemma 4's, whose </s> is a word": (with_tokens("<turn|>", "<|tool_response>", "<eos>"), [4, 5, 6]),
    "MiniMax's, Kimi's": (with_tokens("[e~[", "[PAD]"), [2, 4, 5]),
    "a turn beside </s>": (with_tokens("<|im_end|>", eos_token_id=4), [4, 2]),
    "keys of code": (
        with_tokens("a", "b", "c", fim_pad_token_id=4, fim_rep_token_id=5, fim_sep_token_id=6),
        [2, 4, 5, 6],
    ),
    "a key of code before texts": (with_tokens("a", "<PAD>", "<|file_sep|>", fim_pad_token_id=4), [2, 4, 6]),
    "a key of code of no token": (with_tokens("<PAD>", fim_pad_token_id=10_000), [2, 10_000, 4]),
    "of any kind": (with_tokens("<|im_end|>", kind=4), [2, 4]),
    "none": (BYTE_LEVEL, [2]),
    "SentencePiece without keys": ({"model": "llama", "tokens": ["<unk>", "<s>", "</s>"]}, [2]),
}


@pytest.mark.parametrize("name", ENDS)
def test_an_answer_ends_where_llama_cpp_ends_it(tmp_path: Path, name: str) -> None:
    tokenizer, expected = ENDS[name]
    assert end_tokens(GgufFile(write(tmp_path / "m.gguf", tokenizer=tokenizer))) == expected


def test_what_ends_an_answer_is_special_whatever_the_file_says(tmp_path: Path) -> None:
    tokenizer = with_tokens("<|im_end|>", kind=1)
    convert(write(tmp_path / "m.gguf", tokenizer=tokenizer), tmp_path / "out")
    made = load_tokenizer(tmp_path / "out")
    assert made.encode("x<|im_end|>", bos=False)[-1] == 4
    assert made.decode([4]) == ""
    assert load(tmp_path / "out").config.eos_token_ids == (2, 4)


def test_tokens_without_a_text_are_named_as_llama_cpp_does(tmp_path: Path) -> None:
    tokens = [*BYTE_LEVEL["tokens"][:-2], "", ""]
    convert(write(tmp_path / "m.gguf", tokenizer=BYTE_LEVEL | {"tokens": tokens, "merges": ["a b"]}), tmp_path / "out")
    made = load_tokenizer(tmp_path / "out")
    assert len(made.inner) == 96
    assert made.decode([94, 95]) == "[EMPTY_94][EMPTY_95]"


def test_chat_templates_and_end_tokens_travel(tmp_path: Path) -> None:
    default, tools = "{{ messages[0]['content'] }}!", "{{ tools }}"
    templates = {"chat_template": default, "chat_templates": ["tool_use"], "chat_template.tool_use": tools}
    convert(write(tmp_path / "m.gguf", tokenizer=BYTE_LEVEL | templates | {"eot_token_id": 0}), tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "again")
    for folder in (tmp_path / "out", tmp_path / "again"):
        inner = load_tokenizer(folder).inner
        assert inner.chat_template == {"default": default, "tool_use": tools}
        assert inner.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab!"
        assert load(folder).config.eos_token_ids == (2, 0)


def drop(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: np.ndarray) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.update({name: value})


BAD: dict[str, tuple[dict[str, Any], type[WisparseError], str]] = {
    "family": ({"architecture": "gemma3"}, ConfigError, "general.architecture = 'gemma3' is not supported"),
    "experts": ({"expert_count": 8}, ConfigError, "llama.expert_count = 8 is not supported"),
    "an adapter": ({"general.type": "adapter"}, ConfigError, "general.type = 'adapter': expected a model"),
    "two scalings": (
        {"change": put("rope_freqs.weight", np.ones(8, np.float32)), "rope.scaling.factor": 2.0},
        ConfigError,
        "llama.rope.scaling.factor = 2 is not supported beside the tensor rope_freqs.weight",
    ),
    "rope": ({"rope.scaling.type": "yarn"}, ConfigError, "llama.rope.scaling.type = 'yarn' is not supported"),
    "rotary part": (
        {"rope.dimension_count": 8},
        ConfigError,
        "rope.dimension_count = 8: expected the head dimension, 16",
    ),
    "factors": (
        {"change": put("rope_freqs.weight", np.linspace(1, 8, 8, dtype=np.float32))},
        ConfigError,
        "rope_freqs.weight: expected the factors of Llama 3's rule",
    ),
    "no blocks": (
        {"block_count": 0},
        ConfigError,
        "num_hidden_layers: expected a positive whole",
    ),
    "a part": ({"split.count": 3}, WeightsError, "one of 3 parts"),
    "missing": ({"change": drop("blk.1.attn_k.weight")}, WeightsError, "tensor blk.1.attn_k.weight is missing"),
    "unexpected": (
        {"change": put("blk.0.ffn_gate_inp.weight", np.ones(3, np.float32))},
        WeightsError,
        "tensor blk.0.ffn_gate_inp.weight is unexpected",
    ),
    "shape": (
        {"change": put("blk.0.attn_k.weight", np.ones((3, 64), np.float32))},
        WeightsError,
        "tensor blk.0.attn_k.weight: expected shape (64, 64), found (3, 64)",
    ),
    "not finite": (
        {"change": put("output_norm.weight", np.full(64, np.nan, np.float32))},
        WeightsError,
        "tensor output_norm.weight is not finite",
    ),
    "split rule": ({"tokenizer": BYTE_LEVEL | {"pre": "new"}}, WisparseError, "tokenizer.ggml.pre = 'new' is not"),
    "vocabulary": (
        {"tokenizer": BYTE_LEVEL | {"model": "bert"}},
        WisparseError,
        "tokenizer.ggml.model = 'bert' is not",
    ),
    "a text of two tokens": (
        {"tokenizer": BYTE_LEVEL | {"tokens": [*BYTE_LEVEL["tokens"][:-1], "ab"]}},
        WisparseError,
        "tokenizer.ggml.tokens: 'ab' is token 92 and token 95",
    ),
    "no merges": (
        {"tokenizer": {k: v for k, v in BYTE_LEVEL.items() if k != "merges"}},
        WisparseError,
        "tokenizer.ggml.merges: expected",
    ),
    "type of a size": ({"block_count": "two"}, WeightsError, "llama.block_count = 'two': expected a whole number"),
    "type of a number": ({"rope.freq_base": "x"}, WeightsError, "llama.rope.freq_base = 'x': expected a number"),
    "type of a list": ({"tokenizer": BYTE_LEVEL | {"tokens": "x"}}, WeightsError, "tokens = 'x': expected a list"),
    "type of an entry": (
        {"tokenizer": BYTE_LEVEL | {"merges": [1, 2]}},
        WeightsError,
        "tokenizer.ggml.merges = [1, 2]: expected a list of entries that are each text",
    ),
    "id of a token": (
        {"tokenizer": BYTE_LEVEL | {"eos_token_id": 9999}},
        WisparseError,
        "tokenizer.ggml.eos_token_id = 9999: expected a token below 96",
    ),
    "merge of one": (
        {"tokenizer": BYTE_LEVEL | {"merges": ["a"]}},
        WisparseError,
        "no tokenizer can be made of it: not enough values",
    ),
    "template that is a path": (
        {"tokenizer": BYTE_LEVEL | {"chat_templates": ["../x"], "chat_template": "x"}},
        WisparseError,
        "tokenizer.chat_templates holds '../x': expected names of templates",
    ),
    "no scores": ({"tokenizer": BYTE_LEVEL | {"model": "llama"}}, WisparseError, "tokenizer.ggml.scores: expected"),
    "no tokenizer": (
        {"tokenizer": {"model": "gpt2"}},
        WisparseError,
        "tokenizer.ggml.tokens and .token_type: expected",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_one_error_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    changes, kind, message = BAD[case]
    file = write(tmp_path / "m.gguf", **changes)
    with pytest.raises(kind, match=re.escape(message)) as caught:
        convert(file, tmp_path / "out")
    assert str(file) in str(caught.value) and [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_damaged_files_and_a_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tmp_path / "m.gguf").read_bytes()
    for data in (b"", b"GGML" + whole[4:], whole[:1000], whole[: len(whole) // 2]):
        (tmp_path / "m.gguf").write_bytes(data)
        with pytest.raises(WeightsError, match="not readable as GGUF"):
            convert(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(WisparseError, match=r"is a GGUF file: make a model folder of it first: wisparse convert"):
        load(tmp_path / "m.gguf")
    with pytest.raises(WisparseError, match=r"none\.gguf: no such file"):
        convert(tmp_path / "none.gguf", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(WisparseError, match=re.escape("pip install 'wisparse-jax[gguf]'")):
        convert(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "name"), [("awq", "AWQ"), ("gptq", "GPTQ"), ("fp8", "FP8"), ("mxfp4", "MXFP4"), ("new", "quantised")]
)
def test_other_quantised_checkpoints_are_refused_by_name(tmp_path: Path, method: str, name: str) -> None:
    raw = json.loads((PARITY / "llama2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": method}}))
    message = f"quant_method = '{method}': {name} checkpoints are not supported; take the model that it was made from"
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(tmp_path)
