"""Tokens per second of decoding, dense and sparse, in the same run; on a GPU.

    python scripts/benchmark_decode.py --shape llama-3.1-8b --sparsity 0.5 --batch 1 --context 512

Random weights at true shapes (configs/SHAPE.json); each layer's threshold is a quantile of the inputs that those
weights produce while decoding, so that every layer really skips its share. `--model PATH --plan PLAN` takes a real
model instead. The cache is filled with random keys and values. The token loop is the one that `generate` runs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from device_time import PEAK_BANDWIDTH, DeviceTime, measure
from jax import lax

from kernels_pallas.decode_attention import HeadNorms, decode_attention
from kernels_pallas.decode_attention.reference import rotate
from kernels_pallas.select.reference import merge_reference
from kernels_pallas.sparse_linear.reference import dot
from wisparse_jax.inference import GREEDY
from wisparse_jax.inference.loop import LoopState, NextLogits, token_loop
from wisparse_jax.models.config import INPUT_GROUPS, LAYERS, LlamaConfig, read_config
from wisparse_jax.models.decode import group_thresholds, kernel_token_logits
from wisparse_jax.models.forward import (
    BlockCache,
    Cache,
    Params,
    Thresholds,
    attend,
    head,
    hidden_states,
    layout,
    rms_norm,
)
from wisparse_jax.models.llama import param_shapes
from wisparse_jax.models.loading import load
from wisparse_jax.models.quantise import quantise_params
from wisparse_jax.sparsity import SparsityPlan, apply

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CALIBRATION_STEPS, ROUNDS = 16, 3


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time decoding."""

    shape: str = "llama-3.1-8b"  # a file of configs/
    model: str | None = None  # a real model instead, with its plan
    plan: Path | None = None
    sparsity: tuple[float, ...] = (0.5,)
    batch: tuple[int, ...] = (1,)
    context: tuple[int, ...] = (512,)
    dtype: str = "bfloat16"
    weights: Literal["stored", "int8"] = "stored"  # of the sparse runs; the dense ones keep dtype
    tokens: int = 96
    repeats: int = 5
    blocks: int | None = None  # fewer than the shape has, for a quick look
    profile: bool = True
    json: bool = False  # one JSON object and nothing else


def main() -> None:
    """Run every combination and print a table."""
    args = tyro.cli(Arguments, description=__doc__)
    if jax.default_backend() != "gpu":
        sys.exit("benchmark_decode: needs an NVIDIA GPU")
    thresholds: Thresholds | None = None
    if args.model is not None:
        if args.plan is None:
            sys.exit("benchmark_decode: --model needs --plan")
        sparse = apply(load(args.model, args.dtype), SparsityPlan.load(args.plan))
        config, params, thresholds = sparse.config, sparse.params, sparse.thresholds
    else:
        config = read_config(CONFIGS / f"{args.shape}.json")
        if args.blocks is not None:
            config = dataclasses.replace(config, num_blocks=args.blocks, windows=config.windows[: args.blocks])
        params = random_params(config, args.dtype)
    runs = []
    for context in args.context:
        for batch in args.batch:
            runs += compare(args, config, params, context, batch, thresholds)
    device = jax.devices()[0].device_kind
    if args.json:
        print(json.dumps({"device": device, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d"), "runs": runs}))
    else:
        print(report(args, device, runs))


def random_params(config: LlamaConfig, dtype: str) -> Params:
    """Weights with standard deviation 0.02, norms of ones, made on the device tensor by tensor."""
    leaves, tree = jax.tree.flatten(param_shapes(config, dtype))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(param_shapes(config, dtype))]

    @functools.partial(jax.jit, static_argnums=1)
    def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)

    made = []
    for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        if len(leaf.shape) == 2:
            made.append(normal(jax.random.key(i), leaf.shape))
        else:
            made.append(jnp.full(leaf.shape, 0.0 if "bias" in name else 1.0, leaf.dtype))
    return jax.tree.unflatten(tree, made)


def random_cache(config: LlamaConfig, batch: int, slots: int, dtype: Any) -> Cache:
    """Keys and values of unit variance."""
    shape = (batch, slots, config.num_kv_heads, config.head_dim)
    make = jax.jit(lambda i: jax.random.normal(jax.random.key(i), shape, dtype))
    return [BlockCache(make(2 * b), make(2 * b + 1)) for b in range(config.num_blocks)]


def calibrated(
    config: LlamaConfig, params: Params, cache: Cache, context: int, batch: int, sparsity: float
) -> Thresholds:
    """One threshold per layer: the quantile of the inputs while decoding sparsely, found in a few rounds."""
    start = jnp.zeros(batch, jnp.int32)

    @jax.jit
    def step(
        params: Params, tokens: jax.Array, slot: jax.Array, cache: Cache, thresholds: Thresholds | None
    ) -> tuple[jax.Array, Cache, list[dict[str, jax.Array]]]:
        records: list[dict[str, Any]] = []
        where = layout(config, batch, 1, slot, start)
        hidden, cache = hidden_states(config, params, tokens[:, None], where, cache, thresholds, records)
        inputs = [{g: jnp.abs(r[names[0]]).astype(jnp.float32) for g, names in INPUT_GROUPS.items()} for r in records]
        return jnp.argmax(head(params, hidden[:, 0]), -1).astype(jnp.int32), cache, inputs

    thresholds: Thresholds | None = None
    for _ in range(ROUNDS):
        tokens, state = jnp.arange(5, 5 + batch, dtype=jnp.int32), cache
        seen: list[list[dict[str, jax.Array]]] = []
        for i in range(CALIBRATION_STEPS):
            tokens, state, inputs = step(params, tokens, jnp.int32(context + i), state, thresholds)
            seen.append(inputs)
        thresholds = []
        for b in range(config.num_blocks):
            taus = {g: jnp.quantile(jnp.stack([s[b][g] for s in seen]), sparsity) for g in INPUT_GROUPS}
            thresholds.append(
                {n: jnp.full(config.layer_shapes[n][0], taus[g]) for g, ns in INPUT_GROUPS.items() for n in ns}
            )
    assert thresholds is not None
    return thresholds


def fused(params: Params) -> list[Params]:
    """The dense baseline's own weights: q, k, v in one matrix, gate and up in another, as its products are fastest."""
    join = jax.jit(lambda *weights: jnp.concatenate(weights, axis=-1))
    made = []
    for block in params["blocks"]:
        groups = {g: [block[n] for n in names] for g, names in INPUT_GROUPS.items()}
        made.append({g: join(*(layer["kernel"] for layer in layers)) for g, layers in groups.items()})
        if "bias" in block["q"]:
            made[-1]["bias"] = join(*(layer["bias"] for layer in groups["attn_in"]))
    return made


def dense_logits(
    config: LlamaConfig,
    kernels: bool,
    params: Params,
    joined: list[Params],
    tokens: jax.Array,
    slot: jax.Array,
    start: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """A dense step on fused weights, its products XLA's; attention XLA's too, or the sparse step's own kernel."""
    where = layout(config, len(tokens), 1, slot, start)
    x, new = params["embed"][tokens], []
    sizes = np.cumsum([config.layer_shapes[n][1] for n in ("q", "k")])
    for i, (block, weights) in enumerate(zip(params["blocks"], joined, strict=True)):
        qkv = dot(rms_norm(x, block["attn_norm"], config.norm_eps), weights["attn_in"])
        qkv = jnp.split(qkv + weights["bias"] if "bias" in weights else qkv, sizes, axis=-1)
        norms = HeadNorms(block["q_norm"], block["k_norm"]) if config.qk_norm else None
        if kernels:
            parts: Any = tuple(part.astype(jnp.float32)[None] for part in qkv)
            partial, highest, total, keys, values = decode_attention(
                parts, (None, None, None), norms, where.cos[:, 0], where.sin[:, 0], *cache[i], slot, start,
                config.windows[i], config.norm_eps,
            )  # fmt: skip
            attended = merge_reference(partial, highest, total, x.dtype)
        else:
            query, key, value = (part.reshape(len(x), 1, -1, config.head_dim) for part in qkv)
            if norms is not None:
                query, key = (rms_norm(a, w, config.norm_eps) for a, w in ((query, norms.query), (key, norms.key)))
            query, key = rotate(query, where.cos, where.sin), rotate(key, where.cos, where.sin)
            keys = lax.dynamic_update_slice(cache[i].keys, key, (0, slot, 0, 0))
            values = lax.dynamic_update_slice(cache[i].values, value, (0, slot, 0, 0))
            attended = attend(config, config.windows[i], where, query, keys, values)[:, 0]
        new.append(BlockCache(keys, values))
        x = x + dot(attended, weights["attn_out"])
        gate, up = jnp.split(dot(rms_norm(x, block["mlp_norm"], config.norm_eps), weights["mlp_in"]), 2, axis=-1)
        x = x + dot(jax.nn.silu(gate) * up, weights["mlp_mid"])
    return head(params, rms_norm(x, params["norm"], config.norm_eps)), new


def compare(
    args: Arguments, config: LlamaConfig, params: Params, context: int, batch: int, given: Thresholds | None
) -> list[dict[str, Any]]:
    """The dense runs and the sparse ones at one batch and context."""
    cache = random_cache(config, batch, context + args.tokens + 8, params["embed"].dtype)
    out, joined = [], fused(params)
    runs: list[tuple[str, Any, Thresholds | None]] = [
        ("dense, XLA", functools.partial(dense_logits, config, False), None),
        ("dense, XLA products, our attention", functools.partial(dense_logits, config, True), None),
    ]
    for sparsity in args.sparsity:
        found = given or calibrated(config, params, cache, context, batch, sparsity)
        name = f"sparse, Triton, {sparsity:.0%}" + (", int8" if args.weights == "int8" else "")
        runs.append((name, functools.partial(sparse_logits, config), found))
    small = quantise_params(params) if args.weights == "int8" else params
    for name, step, thresholds in runs:
        weights = joined if thresholds is None else group_thresholds(thresholds)
        own = params if thresholds is None else small
        run = loop(args, config, own, weights, cache, context, batch, step)
        run()
        seconds = sorted(timed(run) for _ in range(args.repeats))[args.repeats // 2] / args.tokens
        row: dict[str, Any] = {"run": name, "batch": batch, "context": context, "ms": seconds * 1e3}
        row["tokens_per_second"] = batch / seconds
        read = weight_bytes(config, own, 1.0)
        if thresholds is not None:
            layers = realised(config, own, cache, context, batch, thresholds)
            row["realised"] = {n: float(layers[:, i].mean()) for i, n in enumerate(LAYERS)}
            row["realised_min_max"] = [float(layers.min()), float(layers.max())]
            share = np.asarray(config.layer_weights) / sum(config.layer_weights)
            row["sparsity"] = float((layers @ share).mean())
            read = weight_bytes(config, own, 1 - row["sparsity"])
        width = jnp.dtype(params["embed"].dtype).itemsize
        read += 2 * batch * context * config.num_kv_heads * config.head_dim * width * config.num_blocks
        row["bytes"] = read
        peak = PEAK_BANDWIDTH.get(jax.devices()[0].device_kind)
        row["roofline"] = None if peak is None else read / peak / seconds
        if args.profile:
            row["profile"] = kernels(measure(run), config, args.tokens)
        out.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "profile"}), file=sys.stderr, flush=True)
    dense = max(row["tokens_per_second"] for row in out[:2])
    for row in out:
        row["ratio"] = row["tokens_per_second"] / dense
    return out


def sparse_logits(
    config: LlamaConfig,
    params: Params,
    grouped: list[dict[str, jax.Array]],
    tokens: jax.Array,
    slot: jax.Array,
    start: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """The library's own sparse step."""
    return kernel_token_logits(config, params, tokens, slot, start, cache, grouped)


def loop(
    args: Arguments,
    config: LlamaConfig,
    params: Params,
    weights: Any,
    cache: Cache,
    context: int,
    batch: int,
    step: Callable[..., tuple[jax.Array, Cache]],
) -> Callable[[], LoopState]:
    """`args.tokens` tokens of the library's own token loop, from a fresh copy of the cache."""
    start, stops = jnp.zeros(batch, jnp.int32), jnp.full(1, -2, jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(batch))
    values = GREEDY.values(config.vocab_size)

    @functools.partial(jax.jit, donate_argnums=2)
    def decode(params: Params, weights: Any, state: LoopState) -> LoopState:
        next_logits: NextLogits = functools.partial(step, params, weights)
        return token_loop(next_logits, state, jnp.int32(args.tokens + 1), start, values, stops)

    def run() -> LoopState:
        first = jnp.arange(5, 5 + batch, dtype=jnp.int32)
        fresh = jax.tree.map(jnp.copy, cache)
        tokens = jnp.full((batch, args.tokens + 1), -1, jnp.int32)
        finished = jnp.zeros(batch, bool)
        state = LoopState(jnp.int32(1), jnp.int32(context), tokens, first, finished, jnp.copy(keys), fresh)
        jax.block_until_ready(state)
        run.started = time.perf_counter()  # type: ignore[attr-defined]
        return decode(params, weights, state)

    return run


def timed(run: Callable[[], LoopState]) -> float:
    """Seconds of the token loop alone, without the copy of the cache."""
    state = run()
    jax.block_until_ready(state.tokens)
    return time.perf_counter() - run.started  # type: ignore[attr-defined]


def realised(
    config: LlamaConfig, params: Params, cache: Cache, context: int, batch: int, thresholds: Thresholds
) -> np.ndarray:
    """Share of channels that no sequence kept, per block and layer, replaying the timed run's first tokens."""
    start = jnp.zeros(batch, jnp.int32)

    @jax.jit
    def step(params: Params, tokens: jax.Array, slot: jax.Array, cache: Cache) -> tuple[jax.Array, Cache, jax.Array]:
        records: list[dict[str, Any]] = []
        logits, cache = kernel_token_logits(
            config, params, tokens, slot, start, cache, group_thresholds(thresholds), records=records
        )
        kept = [jnp.concatenate([r[g].counts.sum(1) for g in INPUT_GROUPS]) for r in records]
        return jnp.argmax(logits, -1).astype(jnp.int32), cache, jnp.stack(kept)

    tokens, state, counts = jnp.arange(5, 5 + batch, dtype=jnp.int32), cache, []
    for i in range(CALIBRATION_STEPS):
        tokens, state, kept = step(params, tokens, jnp.int32(context + i), state)
        counts.append(np.asarray(kept))
    return 1 - np.mean(counts, axis=0) / np.array([config.layer_shapes[n][0] for n in LAYERS])


def weight_bytes(config: LlamaConfig, params: Params, kept: float) -> float:
    """Bytes of weights that one step reads: the kept rows of the block linears, and the whole head."""
    width = params["blocks"][0]["q"]["kernel"].dtype.itemsize
    blocks = config.num_blocks * sum(config.layer_weights) * width
    return blocks * kept + config.hidden_size * config.vocab_size * params["embed"].dtype.itemsize


def kernels(spent: DeviceTime, config: LlamaConfig, tokens: int) -> dict[str, Any]:
    """Launches and microseconds per token by kernel, and what each block spends in and outside its products."""
    rows = {
        name: {"launches": len(times) / tokens, "us": sum(times) / tokens * 1e6}
        for name, times in spent.kernels.items()
    }
    top = dict(sorted(rows.items(), key=lambda item: -item[1]["us"])[:14])
    per_block = 1e6 / tokens / config.num_blocks
    product = sum(sum(t) for name, t in spent.kernels.items() if "sparse_product" in name) * per_block
    return {
        "busy_us": spent.busy / tokens * 1e6,
        "span_us": spent.span / tokens * 1e6,
        "launches": sum(row["launches"] for row in rows.values()),
        "product_us_per_block": product,
        "kernels": top,
    }


def report(args: Arguments, device: str, runs: list[dict[str, Any]]) -> str:
    """All runs as a Markdown table, and where their time goes."""
    lines = [
        f"{args.model or args.shape}, {args.dtype}, {device}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}; "
        f"median of {args.repeats} runs of {args.tokens} tokens\n",
        "| run | batch | context | tok/s | ms/step | ratio | GB a step | of peak bandwidth | realised (least, most) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        roofline = "" if r["roofline"] is None else f"{r['roofline']:.0%}"
        low, high = r.get("realised_min_max", (0, 0))
        lines.append(
            f"| {r['run']} | {r['batch']} | {r['context']} | {r['tokens_per_second']:.1f} | {r['ms']:.3f} "
            f"| {r['ratio']:.2f}x | {r['bytes'] / 1e9:.2f} | {roofline} "
            f"| {r.get('sparsity', 0):.3f} ({low:.3f}, {high:.3f}) |"
        )
    for r in runs:
        if "profile" in r:
            p = r["profile"]
            lines.append(
                f"\n{r['run']}, batch {r['batch']}, context {r['context']}: {p['launches']:.0f} launches a token, "
                f"{p['busy_us']:.0f} us in kernels of {p['span_us']:.0f} us; "
                f"products {p['product_us_per_block']:.1f} us a block"
            )
            lines += [f"- {name}: {k['launches']:.1f} launches, {k['us']:.1f} us" for name, k in p["kernels"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
