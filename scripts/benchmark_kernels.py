"""Microseconds and bytes of every operation of the sparse decode step, beside XLA's dense products; on a GPU.

    python scripts/benchmark_kernels.py --shape llama-3.1-8b --sparsity 0.5 --batch 1 --context 512

The sparse operations run inside the decode step of one block, random weights at true shapes: on their own they would
have no order, and XLA's CUDA graphs run independent kernels side by side. A time is the median of a kernel's events in
the profiler, without the gaps between kernels. A step's first selection has no product to add, a later block's has.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from kernels_pallas.decode_attention import splits_for
from kernels_pallas.decode_step import product_configs
from kernels_pallas.formats import Format
from kernels_pallas.sparse_linear.reference import dot
from kernels_pallas.sparse_product import Config
from kernels_pallas.sparse_product.config import splits
from wisparse_jax.benchmark.dense_step import fused
from wisparse_jax.benchmark.device_time import PEAK_BANDWIDTH, measure
from wisparse_jax.benchmark.random_model import calibrated, random_cache, random_params
from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import INPUT_GROUPS, LlamaConfig, read_config
from wisparse_jax.models.decode import Record, group_thresholds, kernel_token_logits
from wisparse_jax.models.formats import block_format
from wisparse_jax.models.forward import Cache, Params
from wisparse_jax.models.quantise import quantise_params
from wisparse_jax.presets import shapes

SPARE = 64  # slots of the cache beyond the context
DENSE_BYTES, DENSE_RUNS = 400e6, 8  # of the weights of one dense chain, many times any cache, and how often it runs
Configs = dict[str, Config]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time the operations of a decode step one by one."""

    shape: str = "llama-3.1-8b"  # a file of configs/
    sparsity: float = 0.5
    batch: int = 1
    context: int = 512
    dtype: str = "bfloat16"
    weights: str = "stored"  # or a format, of the sparse products; the dense ones keep dtype
    steps: int = 16  # decode steps under the profiler
    json: bool = False  # one JSON object and nothing else


def main() -> None:
    """Measure and print a table."""
    args = tyro.cli(Arguments, description=__doc__)
    if jax.default_backend() != "gpu":
        sys.exit("benchmark_kernels: needs an NVIDIA GPU")
    try:
        config = read_config(shapes()[args.shape])
        # One block's weights and the head are many times the L2.
        config = dataclasses.replace(config, num_blocks=1, windows=config.windows[:1])
        rows = benchmark(args, config)
    except WisparseError as error:
        sys.exit(f"benchmark_kernels: {error}")
    device = jax.devices()[0].device_kind
    if args.json:
        about = {"device": device, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d"), "operations": rows}
        print(json.dumps(dataclasses.asdict(args) | about))
    else:
        print(report(args, device, rows))


def benchmark(args: Arguments, config: LlamaConfig) -> list[dict[str, Any]]:
    """One row for each operation of a block, in the order in which they run."""
    params = random_params(config, args.dtype)
    cache = random_cache(config, args.batch, args.context + SPARE, params["embed"].dtype)
    thresholds = calibrated(config, params, cache, args.context, args.batch, args.sparsity)
    joined = fused(params)[0]
    dense = {f"sparse_product {group}": dense_seconds(joined[group], args.batch) for group in INPUT_GROUPS}
    params = params if args.weights == "stored" else quantise_params(params, args.weights)
    configs = product_configs(params["blocks"][0], args.batch)
    form = block_format(params)
    limits = group_thresholds(thresholds, len(form.planes))
    seconds, kept = sparse_seconds(args, config, configs, params, limits, cache)
    needed = bytes_needed(args, config, configs, kept, form)
    peak = PEAK_BANDWIDTH.get(jax.devices()[0].device_kind)
    return [row(n, seconds[n], needed[n], peak, dense.get(n)) for n in seconds]


def events_of(config: LlamaConfig, planes: int) -> dict[str, str]:
    """The operations of a block in the order in which they run, each with the name of its kernel."""
    selects = dict(zip(INPUT_GROUPS, ("select_norm", "select_attention", "select_norm", "select_gated"), strict=True))
    events = {}
    for group, names in INPUT_GROUPS.items():
        size_in, size_out = config.layer_shapes[names[0]][0], sum(config.layer_shapes[n][1] for n in names)
        events[f"{selects[group]} {group}"] = f"{selects[group]}_{len(names) * planes}x{size_in}"
        events[f"sparse_product {group}"] = f"sparse_product_{size_in}x{size_out}"
        if group == "attn_in":
            events["decode_attention"] = "decode_attention"
    return events


def one_step(config: LlamaConfig, how: dict[str, Any], params: Params, thresholds: Any, *token: Any) -> Any:
    """The next tokens, the cache, and the counts of each group's lists; `how` as `kernel_token_logits` takes it."""
    records: list[Record] = []
    logits, cache = kernel_token_logits(config, params, *token, thresholds=thresholds, records=records, **how)
    # Not summed here: the sum would be a kernel, and might run beside those that are timed.
    return jnp.argmax(logits, -1).astype(jnp.int32), cache, records[0]


def sparse_seconds(
    args: Arguments, config: LlamaConfig, configs: Configs, params: Params, thresholds: Any, cache: Cache
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Seconds of each operation, and the channels that each layer of each group kept, a step."""
    # The cache is donated, as in the token loop: a copy of it would leave it in the L2 for the attention to find.
    step = jax.jit(functools.partial(one_step, config, {"configs": configs}), donate_argnums=5)
    first, start = jnp.arange(5, 5 + args.batch, dtype=jnp.int32), jnp.zeros(args.batch, jnp.int32)
    slot = jnp.int32(args.context)  # of every step, so that all read as many bytes

    def run() -> list[dict[str, jax.Array]]:
        tokens, state, seen = first, jax.tree.map(jnp.copy, cache), []
        for _ in range(args.steps):
            tokens, state, counts = step(params, thresholds, tokens, slot, start, state)
            seen.append(counts)
        return seen

    seen = jax.block_until_ready(run())
    kernels = measure(run)
    seconds = {}
    for name, event in events_of(config, len(block_format(params).planes)).items():
        times = [t for kernel, each in kernels.items() if re.search(rf"{event}(?!\d)", kernel) for t in each]
        if len(times) != args.steps:
            raise RuntimeError(f"{name}: expected {args.steps} launches of {event}, the profiler saw {len(times)}")
        seconds[name] = float(np.median(times))
    return seconds, {g: np.mean([np.asarray(s[g]).sum(1) for s in seen], axis=0) for g in INPUT_GROUPS}


def dense_chain(x: jax.Array, zero: jax.Array, weights: list[jax.Array]) -> list[jax.Array]:
    """Products that run one by one: each waits for an element of the last, times a zero that XLA does not know."""
    out: list[jax.Array] = []  # all returned, so that none is computed in part
    for weight in weights:
        out.append(dot(x if not out else x + zero * out[-1][:, :1], weight))
    return out


def dense_seconds(weight: jax.Array, batch: int) -> float:
    """Seconds of XLA's dense product with this weight, over enough copies of it that none is in a cache."""
    copies = [weight, *(jnp.copy(weight) for _ in range(int(DENSE_BYTES // weight.nbytes)))]
    x = jax.random.normal(jax.random.key(0), (batch, weight.shape[0]), weight.dtype)
    chain = functools.partial(jax.jit(dense_chain), x, jnp.zeros((), weight.dtype), copies)
    jax.block_until_ready(chain())
    kernels = measure(lambda: [chain() for _ in range(DENSE_RUNS)])
    return product_seconds(kernels, DENSE_RUNS * len(copies))


def product_seconds(kernels: dict[str, list[float]], products: int) -> float:
    """Seconds of one product of a chain: of its long kernels, as XLA names kernels freely, but only those read weights.

    A short kernel that adds up parts of a product is left out with those between products: in the dense one's favour.
    """
    longest = max(float(np.median(times)) for times in kernels.values())
    long = [t for times in kernels.values() if np.median(times) > longest / 2 for t in times]
    return float(np.median(long)) * len(long) / products


def bytes_needed(
    args: Arguments, config: LlamaConfig, configs: Configs, kept: dict[str, Any], form: Format
) -> dict[str, float]:
    """Bytes of the kept rows of weights, of the cache that is visible, and of the selections' inputs and lists."""
    batch, hidden, width = args.batch, config.hidden_size, jnp.dtype(args.dtype).itemsize
    # Scales are read with each plane.
    per_weight = (np.array(form.planes) + (0 if form.group is None else 16 / form.group)) / 8
    needed, parts, lists = {}, {}, {}
    for group, names in INPUT_GROUPS.items():
        size, rows = config.layer_shapes[names[0]][0], configs[group].rows
        chunks, outs = -(-size // rows), np.array([config.layer_shapes[n][1] for n in names])
        needed[f"sparse_product {group}"] = float(outs @ kept[group].reshape(len(outs), -1) @ per_weight)
        parts[group] = splits(configs[group], size)  # read by what runs next
        # Thresholds; then counts, channels and values.
        lists[group] = len(names) * len(form.planes) * (4 * size + chunks * (4 + rows * (4 + batch * width)))
    visible = min(args.context, (config.windows[0] or args.context + 1) - 1)  # the token itself is not read
    needed["decode_attention"] = 2 * batch * visible * config.num_kv_heads * config.head_dim * width
    norm = (2 * batch + 1) * width  # the stream, read and written, and the norm's weight
    needed["select_norm attn_in"] = lists["attn_in"] + hidden * norm
    added = 4 * batch * parts["attn_out"] + config.o_bias * width
    needed["select_norm mlp_in"] = lists["mlp_in"] + hidden * (norm + added)
    heads = config.num_heads * splits_for(batch, config.num_kv_heads, args.context + SPARE)
    needed["select_attention attn_out"] = lists["attn_out"] + 4 * batch * heads * (config.head_dim + 2)
    read = 4 * batch * parts["mlp_in"] + config.mlp_bias * width
    needed["select_gated mlp_mid"] = lists["mlp_mid"] + 2 * config.intermediate_size * read
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
    lines = [
        f"{args.shape}, {args.dtype}, {args.weights} weights, sparsity {args.sparsity:.0%}, batch {args.batch}, "
        f"context {args.context}; {device}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}; {args.steps} steps\n",
        "| operation | us | MB needed | TB/s | of the roofline | XLA dense us | dense / sparse |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        mb, roofline = f"{r['bytes'] / 1e6:.3f}", "" if r["roofline"] is None else f"{r['roofline']:.0%}"
        dense = "|  |  |" if r["dense_us"] is None else f"| {r['dense_us']:.2f} | {r['ratio']:.2f}x |"
        lines.append(f"| {r['operation']} | {r['us']:.2f} | {mb} | {r['tb_per_s']:.2f} | {roofline} {dense}")
    products = [r for r in rows if r["dense_us"] is not None]
    sparse, dense = (sum(r[key] for r in products) for key in ("us", "dense_us"))
    rest = sum(r["us"] for r in rows if r["dense_us"] is None)
    total = f"products {sparse:.1f} us, dense {dense:.1f} us ({dense / sparse:.2f}x); everything else {rest:.1f} us"
    return "\n".join([*lines, f"\nA block: {total}"])


if __name__ == "__main__":
    main()
