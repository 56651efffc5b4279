"""Make tests/fixtures/parity: small random models of every supported variant, and what transformers says of them.

Needs torch and transformers (5.x); nothing else in the project does. From the top of the checkout:

    python scripts/make_parity_fixtures.py

Each fixture is a folder in Hugging Face format (config.json, model.safetensors) and reference.safetensors:

    tokens, logits                    a plain batch [2, 16] and its float32 logits
    padded_tokens, start, padded_logits   a batch padded on the left; row b begins at start[b]
    long_tokens, long_logits          one sequence past the rope boundary or longer than the window; last 32 positions
    prompt, greedy                    8 tokens and the 64 that greedy decoding adds
    margin                            the smallest lead of a greedy token over the next best, in logits
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports] - made once, by hand; the tests need neither torch nor this
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# name: (model_type, fields beside SIZES, dtype of the file). `rope_theta` and `rope_scaling` are the old style of
# config.json, `rope_parameters` the new one; a config.json is written as given here.
VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama2": ("llama", {"num_key_value_heads": 4, "rope_scaling": None}, "float16"),
    "llama3": ("llama", {"rope_theta": 500000.0}, "bfloat16"),
    "llama3.1": ("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3}, "bfloat16"),
    "llama3.2": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 500000.0, **LLAMA3, "factor": 32.0}},
        "bfloat16",
    ),
    "llama-linear-rope": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "bfloat16"),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}, "bfloat16"),
    "llama-head-dim": (
        "llama",
        {"head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
        "bfloat16",
    ),
    "mistral": ("mistral", {"sliding_window": 16, "head_dim": 16}, "bfloat16"),
    "qwen2": ("qwen2", {"rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 16}, "bfloat16"),
    "qwen2-window": (
        "qwen2",
        {"rope_theta": 1000000.0, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        "bfloat16",
    ),
    "qwen2.5": (
        "qwen2",
        {
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
            "layer_types": ["full_attention"] * 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        "bfloat16",
    ),
    "qwen3": (
        "qwen3",
        {"head_dim": 24, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
        "bfloat16",
    ),
    "smollm2": (
        "llama",
        {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 100000.0},
        "float32",
    ),
    # transformers' Auto class makes Ministral of it.
    "mistral-window": (
        "mistral",
        {"sliding_window": 16, "head_dim": 16, "layer_types": ["full_attention", "sliding_attention"]},
        "bfloat16",
    ),
}
LENGTH, LONG, KEPT, GREEDY = 16, 96, 32, 64


def build(kind: str, fields: dict[str, Any], dtype: torch.dtype, seed: int) -> tuple[dict[str, Any], Any]:
    """The contents of config.json, and a float32 model whose values are exact in `dtype`."""
    raw = {"model_type": kind, **SIZES, **fields}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    raw["architectures"] = [type(model).__name__]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in name:
                value.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                value.copy_(0.5 * noise)
            elif "embed_tokens" in name:
                value.copy_((0.3 if config.tie_word_embeddings else 1.0) * noise)
            else:
                value.copy_(1.5 * noise / value.shape[1] ** 0.5)
            value.copy_(value.to(dtype).float())
    return raw, model


def greedy(model: Any, prompt: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The tokens that follow the prompt, by whole forwards, and the smallest lead over the second best."""
    tokens, margin = prompt, float("inf")
    for _ in range(GREEDY):
        best = model(tokens, use_cache=False).logits[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        tokens = torch.cat([tokens, best.indices[None, :1]], dim=1)
    return tokens[0, prompt.shape[1] :], margin


@torch.no_grad()
def reference(model: Any, seed: int) -> dict[str, torch.Tensor]:
    """What the tests compare with."""
    rng = np.random.default_rng(seed)

    def ids(*shape: int) -> torch.Tensor:
        return torch.tensor(rng.integers(3, SIZES["vocab_size"], shape))

    tokens, padded, long = ids(2, LENGTH), ids(2, LENGTH), ids(1, LONG)
    start = torch.tensor([0, 7])
    mask = (torch.arange(LENGTH)[None] >= start[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = padded * mask
    # Of several prompts the one with the most varied answer, among those where rounding cannot decide a token.
    prompts = [ids(1, 8) for _ in range(16)]
    found = [greedy(model, prompt) for prompt in prompts]
    best = max(range(len(found)), key=lambda i: (found[i][1] > 0.01, len(found[i][0].unique()), found[i][1]))
    return {
        "tokens": tokens.int(),
        "logits": model(tokens, use_cache=False).logits,
        "padded_tokens": padded.int(),
        "start": start.int(),
        "padded_logits": model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits,
        "long_tokens": long.int(),
        "long_logits": model(long, use_cache=False).logits[:, -KEPT:].contiguous(),
        "prompt": prompts[best].int(),
        "greedy": found[best][0].int(),
        "margin": torch.tensor(found[best][1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "tests" / "fixtures" / "parity")
    out = parser.parse_args().out
    for seed, (name, (kind, fields, dtype_name)) in enumerate(VARIANTS.items()):
        dtype = getattr(torch, dtype_name)
        raw, model = build(kind, fields, dtype, seed)
        wanted = reference(model, seed)
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        tied = raw["tie_word_embeddings"]
        state = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
        state = {k: v.to(dtype).contiguous() for k, v in state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        save_file(wanted, folder / "reference.safetensors")
        size = sum(f.stat().st_size for f in folder.iterdir()) / 1e3
        logits = wanted["logits"]
        print(
            f"{name:18} {size:6.0f} kB   logits: sd {logits.std():.2f} max {logits.abs().max():.2f}   "
            f"margin {float(wanted['margin']):.4f}   distinct greedy tokens {len(set(wanted['greedy'].tolist()))}"
        )


if __name__ == "__main__":
    main()
