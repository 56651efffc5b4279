"""Microseconds and bytes of every operation of the sparse decode step, beside XLA's dense products; on a GPU.

    python scripts/benchmark_kernels.py --shape llama-3.1-8b --sparsity 0.5 --batch 1 --context 512

The sparse operations run inside the decode step of one block, random weights at true shapes: on their own they would
have no order, and XLA's CUDA graphs run independent kernels side by side. The first selection of a step has no product
to add, unlike that of a later block. A time is the median of the profiler's events of one kernel, which leave out the
gaps between kernels; the bytes are those that the operation cannot do without.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from dense_step import fused
from device_time import PEAK_BANDWIDTH, measure
from random_model import CONFIGS, calibrated, random_cache, random_params

from kernels_pallas.decode_attention.api import splits_for
from kernels_pallas.sparse_linear.reference import dot
from kernels_pallas.sparse_product import Config, Ring
from wisparse_jax.errors import WisparseError
from wisparse_jax.inference.loop import decode_implementation
from wisparse_jax.models.config import INPUT_GROUPS, LlamaConfig, read_config
from wisparse_jax.models.decode import GroupThresholds, group_thresholds, kernel_token_logits, product_configs
from wisparse_jax.models.forward import Cache, Params
from wisparse_jax.models.quantise import quantise_params

SPARE = 64  # slots of the cache beyond the context
DENSE_BYTES, DENSE_RUNS = 400e6, 8  # of the weights of one dense chain, many times any cache, and how often it runs


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time the operations of a decode step one by one."""

    shape: str = "llama-3.1-8b"  # a file of configs/
    sparsity: float = 0.5
    batch: int = 1
    context: int = 512
    dtype: str = "bfloat16"
    implementation: Literal["triton", "mosaic"] | None = None  # by default the faster one
    weights: Literal["stored", "int8"] = "stored"  # of the sparse products; the dense ones keep dtype
    steps: int = 16  # decode steps under the profiler
    json: bool = False  # one JSON object and nothing else


def main() -> None:
    """Measure and print a table."""
    args = tyro.cli(Arguments, description=__doc__)
    if jax.default_backend() != "gpu":
        sys.exit("benchmark_kernels: needs an NVIDIA GPU")
    try:
        config = read_config(CONFIGS / f"{args.shape}.json")
        # One block's weights and the head are many times the cache, so that no step finds its weights there.
        config = dataclasses.replace(config, num_blocks=1, windows=config.windows[:1])
        rows = benchmark(args, config)
    except WisparseError as error:
        sys.exit(f"benchmark_kernels: {error}")
    device = jax.devices()[0].device_kind
    if args.json:
        about = {"device": device, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
        print(json.dumps(about | dataclasses.asdict(args) | {"operations": rows}))
    else:
        print(report(args, device, rows))


def benchmark(args: Arguments, config: LlamaConfig) -> list[dict[str, Any]]:
    """One row for each operation of a block, in the order in which they run."""
    params, slots = random_params(config, args.dtype), args.context + SPARE
    cache = random_cache(config, args.batch, slots, params["embed"].dtype)
    thresholds = calibrated(config, params, cache, args.context, args.batch, args.sparsity)
    # The dense ones first, so that their copies of the weights are gone when the sparse ones run.
    dense = {
        f"sparse_product {group}": dense_seconds(weight, args.batch) for group, weight in fused(params)[0].items()
        if group in INPUT_GROUPS
    }  # fmt: skip
    params = quantise_params(params) if args.weights == "int8" else params
    weight_dtype = params["blocks"][0]["q"]["kernel"].dtype
    implementation = decode_implementation(thresholds, 1, args.implementation)
    configs = product_configs(config, args.batch, weight_dtype, implementation == "mosaic")
    seconds, kept = sparse_seconds(args, config, configs, params, group_thresholds(thresholds), cache)
    widths = jnp.dtype(args.dtype).itemsize, weight_dtype.itemsize
    needed = bytes_needed(config, configs, kept, args.batch, args.context, slots, *widths)
    peak = PEAK_BANDWIDTH.get(jax.devices()[0].device_kind)
    rows = [row(name, seconds[name], needed[name], peak, dense.get(name)) for name in events_of(config)]
    for made in rows:
        kind, _, group = made["operation"].partition(" ")
        if kind == "sparse_product":
            made["kernel"] = "mosaic" if isinstance(configs[group], Ring) else "triton"
            made["kept"] = float(kept[group].mean() / config.layer_shapes[INPUT_GROUPS[group][0]][0])
    return rows


def events_of(config: LlamaConfig) -> dict[str, str]:
    """The operations of a block in the order in which they run, each with the name of its kernel."""
    select = {"attn_in": "norm", "attn_out": "attention", "mlp_in": "norm", "mlp_mid": "gated"}
    events = {}
    for group, names in INPUT_GROUPS.items():
        size_in, size_out = config.layer_shapes[names[0]][0], sum(config.layer_shapes[n][1] for n in names)
        events[f"select_{select[group]} {group}"] = f"select_{select[group]}_{len(names)}x{size_in}"
        events[f"sparse_product {group}"] = f"sparse_product_{size_in}x{size_out}"
        if group == "attn_in":
            events["decode_attention"] = "decode_attention"
    return events


def one_step(
    config: LlamaConfig,
    configs: dict[str, Config | Ring],
    params: Params,
    thresholds: list[GroupThresholds],
    tokens: jax.Array,
    slot: jax.Array,
    start: jax.Array,
    cache: Cache,
    interpret: bool = False,
) -> tuple[jax.Array, Cache, dict[str, jax.Array]]:
    """The next tokens, the cache, and how many channels each group's lists kept."""
    records: list[dict[str, Any]] = []
    logits, cache = kernel_token_logits(
        config, params, tokens, slot, start, cache, thresholds, interpret=interpret, records=records, configs=configs
    )
    # Not summed here: the sum would be a kernel, and might run beside those that are timed.
    counts = {group: kept.counts for group, kept in records[0].items()}
    return jnp.argmax(logits, -1).astype(jnp.int32), cache, counts


def sparse_seconds(
    args: Arguments,
    config: LlamaConfig,
    configs: dict[str, Config | Ring],
    params: Params,
    thresholds: list[GroupThresholds],
    cache: Cache,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Seconds of each operation, and the channels that each layer of each group kept, a step."""
    # The cache is donated, as in the token loop: a copy of it would leave it in the L2 for the attention to find.
    step = jax.jit(functools.partial(one_step, config, configs), donate_argnums=5)
    first, start = jnp.arange(5, 5 + args.batch, dtype=jnp.int32), jnp.zeros(args.batch, jnp.int32)
    slot = jnp.int32(args.context)  # of every step, so that all read as many bytes
    seen: list[dict[str, jax.Array]] = []

    def run() -> jax.Array:
        tokens, state = first, jax.tree.map(jnp.copy, cache)
        seen.clear()
        for _ in range(args.steps):
            tokens, state, counts = step(params, thresholds, tokens, slot, start, state)
            seen.append(counts)
        return tokens

    jax.block_until_ready(run())
    kernels = measure(run).kernels
    seconds = {}
    for name, event in events_of(config).items():
        times = [t for kernel, launches in kernels.items() if re.search(rf"{event}(?!\d)", kernel) for t in launches]
        if len(times) != args.steps:
            raise RuntimeError(f"{name}: expected {args.steps} launches of {event}, the profiler saw {len(times)}")
        seconds[name] = float(np.median(times))
    return seconds, {g: np.mean([np.asarray(s[g]).sum(1) for s in seen], axis=0) for g in INPUT_GROUPS}


def dense_chain(x: jax.Array, zero: jax.Array, weights: list[jax.Array]) -> list[jax.Array]:
    """Products that run one after the other: each waits for an element of the one before, times a zero that the
    compiler does not know. All are returned, so that none is computed in part.
    """
    out: list[jax.Array] = []
    for weight in weights:
        out.append(dot(x if not out else x + zero * out[-1][:, :1], weight))
    return out


def dense_seconds(weight: jax.Array, batch: int) -> float:
    """Seconds of XLA's dense product with this weight, over enough copies of it that none is in a cache."""
    copies = [weight, *(jnp.copy(weight) for _ in range(int(DENSE_BYTES // weight.nbytes)))]
    x = jax.random.normal(jax.random.key(0), (batch, weight.shape[0]), weight.dtype)
    chain = functools.partial(jax.jit(dense_chain), x, jnp.zeros((), weight.dtype), copies)
    jax.block_until_ready(chain())
    kernels = measure(lambda: [chain() for _ in range(DENSE_RUNS)]).kernels
    return product_seconds(kernels, DENSE_RUNS * len(copies))


def product_seconds(kernels: dict[str, list[float]], products: int) -> float:
    """Seconds of one product of a chain, told from the kernels between products by their length.

    XLA names kernels freely, but what reads a weight takes many times what adds a few numbers. A kernel that adds up
    parts of a product counts as such a one, in favour of the dense product.
    """
    longest = max(float(np.median(times)) for times in kernels.values())
    long = [t for times in kernels.values() if np.median(times) > longest / 2 for t in times]
    return float(np.median(long)) * len(long) / products


def bytes_needed(
    config: LlamaConfig,
    configs: dict[str, Config | Ring],
    kept: dict[str, np.ndarray],
    batch: int,
    context: int,
    slots: int,
    width: int,
    weight_width: int,
) -> dict[str, float]:
    """Bytes of the kept rows of weights, of the cache that is visible, and of the selections' inputs and lists."""
    hidden, middle = config.hidden_size, config.intermediate_size
    needed, parts, lists = {}, {}, {}
    for group, names in INPUT_GROUPS.items():
        size, rows = config.layer_shapes[names[0]][0], configs[group].rows
        chunks, outs = -(-size // rows), [config.layer_shapes[n][1] for n in names]
        needed[f"sparse_product {group}"] = weight_width * float(np.dot(kept[group], outs))
        parts[group] = -(-chunks // configs[group].lists)  # partial sums, read by what runs next
        # Thresholds; then counts, channels and values.
        lists[group] = len(names) * (4 * size + chunks * (4 + rows * (4 + batch * width)))
    window = config.windows[0]
    visible = context if window is None else min(context, window - 1)  # but for the token itself
    needed["decode_attention"] = 2 * batch * visible * config.num_kv_heads * config.head_dim * width
    norm = (2 * batch + 1) * hidden * width  # the stream, read and written, and the norm's weight
    needed["select_norm attn_in"] = lists["attn_in"] + norm
    needed["select_norm mlp_in"] = lists["mlp_in"] + norm + hidden * (
        4 * batch * parts["attn_out"] + config.o_bias * width
    )  # fmt: skip
    heads = config.num_heads * splits_for(batch, config.num_kv_heads, slots)
    needed["select_attention attn_out"] = lists["attn_out"] + 4 * batch * heads * (config.head_dim + 2)
    gated = 4 * batch * parts["mlp_in"] + config.mlp_bias * width
    needed["select_gated mlp_mid"] = lists["mlp_mid"] + 2 * middle * gated
    return needed


def row(name: str, seconds: float, needed: float, peak: float | None, dense: float | None) -> dict[str, Any]:
    """What the table says of one operation."""
    return {
        "operation": name,
        "us": seconds * 1e6,
        "bytes": needed,
        "tb_per_s": needed / seconds / 1e12,
        "roofline": None if peak is None else needed / peak / seconds,
        "dense_us": None if dense is None else dense * 1e6,
        "ratio": None if dense is None else dense / seconds,
    }


def report(args: Arguments, device: str, rows: list[dict[str, Any]]) -> str:
    """All operations as a Markdown table, and their sums."""
    int8 = ", int8" if args.weights == "int8" else ""
    lines = [
        f"{args.shape}, {args.dtype}{int8}, sparsity {args.sparsity:.0%}, batch {args.batch}, context {args.context}; "
        f"{device}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}; medians of {args.steps} steps\n",
        "| operation | us | MB needed | TB/s | of the roofline | XLA dense us | dense / sparse |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        name = r["operation"] + (f", {r['kernel']}" if "kernel" in r else "")
        roofline = "" if r["roofline"] is None else f"{r['roofline']:.0%}"
        dense = "|  |  |" if r["dense_us"] is None else f"| {r['dense_us']:.2f} | {r['ratio']:.2f}x |"
        lines.append(f"| {name} | {r['us']:.2f} | {r['bytes'] / 1e6:.3f} | {r['tb_per_s']:.2f} | {roofline} {dense}")
    products = [r for r in rows if r["dense_us"] is not None]
    sparse, dense = (sum(r[key] for r in products) for key in ("us", "dense_us"))
    rest = sum(r["us"] for r in rows if r["dense_us"] is None)
    lines.append(
        f"\nA block: products {sparse:.1f} us, dense {dense:.1f} us ({dense / sparse:.2f}x); "
        f"everything else {rest:.1f} us"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
