"""Train the demo model from raw text and write it as a Hugging Face folder.

    python scripts/pretrain_demo.py --text gutenberg.txt.xz openstax.txt.xz --minutes 7 --out demo_model

Texts are UTF-8, plain or .xz, documents separated by `<|endofdoc|>`; every 40th document of each file is held out.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import lzma
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from safetensors.flax import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from wisparse_jax.models.config import LlamaConfig, parse_config
from wisparse_jax.models.decoder import Decoder
from wisparse_jax.models.fingerprint import flat
from wisparse_jax.models.forward import head, hidden_states, layout
from wisparse_jax.models.parameters import hf_name
from wisparse_jax.models.weights import transposed

SEPARATOR, HELD_OUT_EVERY = "<|endofdoc|>", 40
BOS, EOS, CONTEXT = 0, 1, 512
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "dtype": "bfloat16",
}
STEPS_PER_CALL = 50


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train the demo model."""

    text: tuple[Path, ...]
    out: Path
    minutes: float = 7.0  # of training; the number of steps follows from the measured step time
    batch: int = 64  # windows of 512 tokens per step
    peak_rate: float = 3e-3
    warmup: int = 300
    seed: int = 0
    tokenizer_characters: int = 100_000  # of each training document


def main() -> None:
    """Train, save, then measure on the held-out documents."""
    args = tyro.cli(Arguments, description=__doc__)
    args.out.mkdir(parents=True)
    documents = {path.name.split(".")[0]: read_documents(path) for path in args.text}
    training = [doc for docs in documents.values() for i, doc in enumerate(docs) if i % HELD_OUT_EVERY]
    held_out = {name: docs[::HELD_OUT_EVERY] for name, docs in documents.items()}
    tokenizer = train_tokenizer(training, args.tokenizer_characters)
    save_tokenizer(tokenizer, args.out)
    stream = jnp.asarray(encode(tokenizer, training))
    say(f"{len(training)} documents, {stream.size} tokens")

    config = parse_config(MODEL)
    params, log = train(config, stream, args)
    save_model(params, args.out)
    log["device"] = jax.devices()[0].device_kind
    log["jax"] = jax.__version__
    log["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    log["held_out_bits_per_byte"] = {
        name: bits_per_byte(config, rounded, tokenizer, docs) for name, docs in held_out.items()
    }
    nats, size = np.sum([(v["nats"], v["bytes"]) for v in log["held_out_bits_per_byte"].values()], axis=0)
    log["held_out_bits_per_byte"]["together"] = nats / size / math.log(2)
    (args.out / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    say(json.dumps({k: v for k, v in log.items() if k != "loss"}, indent=1))


def say(text: str) -> None:
    """One line of progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def read_documents(path: Path) -> list[str]:
    """The documents of a text file."""
    raw = path.read_bytes()
    text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode()
    return [doc.strip() for doc in text.split(SEPARATOR) if doc.strip()]


def train_tokenizer(documents: list[str], characters: int) -> Tokenizer:
    """A byte-level BPE of the model's vocabulary, from the start of each document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"],
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((doc[:characters] for doc in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    assert tokenizer.get_vocab_size() == MODEL["vocab_size"]
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json, and the settings by which transformers finds it."""
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """All documents as one stream, each between BOS and EOS."""
    parts = []
    for at in range(0, len(documents), 64):
        for item in tokenizer.encode_batch_fast(documents[at : at + 64], add_special_tokens=False):
            parts.append(np.asarray([BOS, *item.ids, EOS], np.uint16))
    return np.concatenate(parts)


def token_nll(config: LlamaConfig, params: Any, windows: jax.Array, dtype: Any) -> jax.Array:
    """Nats of every token after the first of each window."""
    cast = jax.tree.map(lambda p: p.astype(dtype), params)
    hidden, _ = hidden_states(config, cast, windows[:, :-1], layout(config, len(windows), windows.shape[1] - 1))
    return optax.softmax_cross_entropy_with_integer_labels(head(cast, hidden), windows[:, 1:])


def train(config: LlamaConfig, stream: jax.Array, args: Arguments) -> tuple[Any, dict[str, Any]]:
    """AdamW with warm-up and a cosine to 2 % of the peak rate; bf16 arithmetic, float32 weights."""
    params = initial(config, args.seed)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(0.1, mask=lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree)),
    )

    def step(carry: Any, rate: jax.Array) -> Any:
        params, state, key = carry
        key, where = jax.random.split(key)
        starts = jax.random.randint(where, (args.batch, 1), 0, stream.size - CONTEXT)
        # Every window begins with BOS, as every prompt and every self-sampled text does.
        body = stream[starts + jnp.arange(CONTEXT)[None]].astype(jnp.int32)
        windows = jnp.concatenate([jnp.full((args.batch, 1), BOS), body], axis=1)
        loss, grads = jax.value_and_grad(lambda p: token_nll(config, p, windows, jnp.bfloat16).mean())(params)
        updates, state = optimiser.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return (params, state, key), loss

    run = jax.jit(lambda carry, rates: jax.lax.scan(step, carry, rates), donate_argnums=0)

    def start() -> Any:
        weights = jax.tree.map(jnp.copy, params)
        return weights, optimiser.init(weights), jax.random.key(args.seed)

    say("compiling")
    carry, _ = run(start(), jnp.zeros(STEPS_PER_CALL))
    jax.block_until_ready(carry)
    began = time.perf_counter()
    jax.block_until_ready(run(carry, jnp.zeros(STEPS_PER_CALL)))
    per_step = (time.perf_counter() - began) / STEPS_PER_CALL
    calls = max(1, int(args.minutes * 60 / per_step / STEPS_PER_CALL))
    steps = calls * STEPS_PER_CALL
    say(f"{per_step * 1e3:.2f} ms a step, {args.batch * CONTEXT / per_step / 1e6:.2f}M tokens/s: {steps} steps")

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.peak_rate, min(args.warmup, steps // 4), steps, 0.02 * args.peak_rate
    )
    rates = jnp.asarray(jax.vmap(schedule)(jnp.arange(steps))).reshape(calls, STEPS_PER_CALL)
    carry, losses, began = start(), [], time.perf_counter()
    for call in range(calls):
        carry, loss = run(carry, rates[call])
        losses.append(loss.mean())
        if call % 20 == 0 or call == calls - 1:
            say(f"step {(call + 1) * STEPS_PER_CALL}: loss {float(losses[-1]):.4f}")
    seconds = time.perf_counter() - began
    log = {
        "steps": steps,
        "tokens": steps * args.batch * CONTEXT,
        "minutes": round(seconds / 60, 2),
        "batch": args.batch,
        "peak_rate": args.peak_rate,
        "seed": args.seed,
        "stream_tokens": int(stream.size),
        "loss": [round(float(loss), 4) for loss in losses],
    }
    return carry[0], log


def initial(config: LlamaConfig, seed: int) -> Any:
    """The modules' own initial values; what writes into the residual stream starts smaller."""
    params = Decoder(config, nnx.Rngs(seed)).params
    for block in params["blocks"]:
        for name in ("o", "down"):
            block[name]["kernel"] = block[name]["kernel"] / math.sqrt(2 * config.num_blocks)
    return params


def save_model(params: Any, out: Path) -> None:
    """config.json and model.safetensors in bfloat16, under Hugging Face names, matrices `[out, in]`."""
    tensors = {}
    for path, value in flat(params).items():
        value = value.T if transposed(path) else value
        tensors[hf_name(path)] = jnp.array(value, jnp.bfloat16)
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(MODEL, indent=1) + "\n")


def bits_per_byte(config: LlamaConfig, params: Any, tokenizer: Tokenizer, documents: list[str]) -> dict[str, float]:
    """Over whole documents: windows of the context, each after BOS, every token counted once."""
    stream = encode(tokenizer, documents).astype(np.int32)
    rows = -(-stream.size // CONTEXT)
    padded = np.full(rows * CONTEXT, EOS, np.int32)
    padded[: stream.size] = stream
    windows = np.concatenate([np.full((rows, 1), BOS), padded.reshape(rows, CONTEXT)], axis=1)
    nll = jax.jit(functools.partial(token_nll, config, dtype=jnp.float32))
    total = 0.0
    for at in range(0, rows, 32):
        batch = windows[np.minimum(np.arange(at, at + 32), rows - 1)]
        values = np.asarray(nll(params, jnp.asarray(batch)), np.float64)[: rows - at].ravel()
        total += values[: stream.size - at * CONTEXT].sum()
    size = sum(len(doc.encode()) for doc in documents)
    return {"bits_per_byte": total / size / math.log(2), "nats": total, "bytes": size, "tokens": int(stream.size)}


if __name__ == "__main__":
    main()
