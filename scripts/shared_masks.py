"""What it costs that several sequences skip the same channels: KL by sparsity and number of sequences.

    python scripts/shared_masks.py MODEL PLAN --calibrate wikitext=wiki.txt@:300000 --evaluate wikitext=wiki.txt@300000:

With a mask of its own for every sequence a step reads the union of what they keep. Here B sequences share one: channel
i is kept, for all of them, where `sqrt(sum over sequences of x_i^2 / B) max(g_i^alpha, 1e-4)` reaches the layer's
threshold, which is found for each B along the sparse run over the calibration text. Basis, gains, exponents and budgets
are the plan's; for another sparsity than the plan's the budgets are scaled, and its biases, trained for one mask, are
left out everywhere, at B = 1 as well. Sequences that share a mask are windows of the text at the same position.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from comparison_texts import read_windows
from tyro.conf import Positional

import wisparse_jax as ws
from kernels_pallas.sparse_linear.reference import dot
from kernels_pallas.weight import Weight
from wisparse_jax.calibration import Calibration, SearchSettings
from wisparse_jax.calibration.dense import run_dense, run_dense_on
from wisparse_jax.calibration.statistics import spaced_tokens, tau_between
from wisparse_jax.evaluation.quality import Figure
from wisparse_jax.models.config import INPUT_GROUPS, LAYERS, LlamaConfig
from wisparse_jax.models.divergence import kl_divergence
from wisparse_jax.models.forward import BlockCache, Params, after_attention, head, layout, rms_norm, self_attention
from wisparse_jax.models.rules import BlockRules, ChannelRule
from wisparse_jax.sparsity import SparsityPlan
from wisparse_jax.sparsity.score import ChannelGains, score_weights


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure shared masks."""

    model: Positional[str]
    plan: Positional[Path]
    calibrate: str = "self"
    evaluate: str = "self"
    sparsities: tuple[float, ...] = (0.5, 0.4, 0.35, 0.3, 0.2)
    sequences: tuple[int, ...] = (1, 2, 4, 8)
    tokens: int = 16_384  # of each text
    window: int = 512
    dtype: str = "float32"


def main() -> None:
    """Print the table, row by row."""
    args = tyro.cli(Arguments, description=__doc__)
    model, plan = ws.load(args.model, dtype=args.dtype), SparsityPlan.load(args.plan)
    plan.check_model(model.fingerprint or "", model.config)
    tokenizer, specs = ws.load_tokenizer(args.model), (args.calibrate, args.evaluate)
    texts = [read_windows(s, model, tokenizer, args.window, args.tokens, seed) for seed, s in enumerate(specs)]
    most = max(args.sequences)
    texts = [windows[: len(windows) // most * most] for windows in texts]
    settings = SearchSettings()
    calibration = run_dense(model, texts[0], settings, basis=plan.basis)
    if plan.gains is not None:
        calibration = calibration.with_gains(plan.gains)
    held_out = run_dense_on(calibration, texts[1], settings, 0)
    device = jax.devices()[0].device_kind
    print(f"{args.model}, {plan.method} plan, {args.dtype} on {device}: KL, nats a token; realised sparsity\n")
    print("| sparsity | " + " | ".join(f"B = {n}" for n in args.sequences) + " |")
    print("|---" * (1 + len(args.sequences)) + "|")
    for sparsity in args.sparsities:
        cells = []
        for together in args.sequences:
            kl, share = measure(calibration, held_out, plan, sparsity, together)
            cells.append(f"{kl:.4f}; {share:.3f}")
        print(f"| {sparsity:.0%} | " + " | ".join(cells) + " |", flush=True)


def measure(
    calibration: Calibration, held_out: Calibration, plan: SparsityPlan, sparsity: float, together: int
) -> tuple[Figure, float]:
    """KL(dense || shared masks) on the held-out run, thresholds from the other, and the realised sparsity there."""
    budgets = scaled(plan, sparsity)
    taus, _, _ = run(calibration, plan, budgets, together, find=True)
    _, shares, x = run(held_out, plan, taus, together, find=False)
    hidden = rms_norm(x, held_out.params["norm"], held_out.config.norm_eps)
    top = {name: held_out.params[name] for name in ("lm_head", "embed") if name in held_out.params}
    kl = np.asarray(divergences(top, held_out.hidden, hidden), np.float64)
    weights = np.asarray(plan.layer_weights, np.float64)
    # Sequences of one mask are one sample.
    return Figure.over(kl.reshape(-1, together).mean(axis=1)), float((shares @ (weights / weights.sum())).mean())


def scaled(plan: SparsityPlan, sparsity: float) -> np.ndarray:
    """The plan's budgets times what makes their mean another one, at most 0.99 each."""
    weights = np.asarray(plan.layer_weights, np.float64)
    table = plan.sparsities
    for _ in range(50):
        mean = float((table @ (weights / weights.sum())).mean())
        table = np.minimum(table * (sparsity / mean), 0.99)
    return table


def run(
    calibration: Calibration, plan: SparsityPlan, values: np.ndarray, together: int, find: bool
) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    """Through all blocks with shared masks: thresholds, realised sparsities, and the last residual stream.

    `values` are budgets if `find`, thresholds otherwise; `[blocks, 7]` as what is returned.
    """
    config, first, x = calibration.config, calibration.dense_positions, calibration.inputs[0]
    taus, shares = [], []
    for b, params in enumerate(calibration.params["blocks"]):
        table = [jnp.asarray(a[b], jnp.float32) for a in (plan.exponents, values)]
        how = config, config.windows[b], first, together, find
        x, tau, share = shared_block(*how, params, x, calibration.caches[b], calibration.gains[b], *table)
        taus.append(np.asarray(tau))
        shares.append(np.asarray(share, np.float64))
    return np.stack(taus), np.stack(shares), x


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def shared_block(
    config: LlamaConfig,
    window: int | None,
    first: int,
    together: int,
    find: bool,
    params: Params,
    x: jax.Array,
    cache: BlockCache,
    gains: ChannelGains,
    exponents: jax.Array,
    values: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One block on `[windows, positions, hidden]`: its output, and the layers' thresholds and realised sparsities."""
    where = layout(config, x.shape[0], x.shape[1], first)
    taus, shares = {}, {}
    rules: BlockRules = {name: ChannelRule(None) for name in LAYERS}

    def settle(group: str, inputs: jax.Array) -> None:
        grouped = inputs.reshape(-1, together, *inputs.shape[1:]).astype(jnp.float32)
        size = jnp.sqrt(jnp.mean(jnp.square(grouped), axis=1))  # [groups, positions, in]
        for name in INPUT_GROUPS[group]:
            i = LAYERS.index(name)
            scores = size * score_weights(gains[name], exponents[i])[None, None]
            rows = scores.reshape(-1, scores.shape[-1])
            taus[name] = tau_between(rows[spaced_tokens(*rows.shape)].ravel(), values[i])[0] if find else values[i]
            kept = scores >= taus[name]
            shares[name] = 1 - jnp.mean(kept.astype(jnp.float32))
            # What the skipped channels would have added is taken off again: rules know no masks of many sequences.
            skipped = jnp.where(kept[:, None], 0.0, grouped).reshape(inputs.shape).astype(inputs.dtype)
            rules[name] = ChannelRule(None, -dot(skipped, Weight.of(params[name])))

    settle("attn_in", rms_norm(x, params["attn_norm"], config.norm_eps))
    attention, _ = self_attention(config, window, params, x, where, cache, rules)
    settle("attn_out", attention)
    for group, reader in (("mlp_in", "gate"), ("mlp_mid", "down")):
        record: dict[str, Any] = {}
        after_attention(config, params, x, attention, rules, record)  # of this only the reader's input is computed
        settle(group, record[reader])
    out = after_attention(config, params, x, attention, rules)
    return out, jnp.stack([taus[name] for name in LAYERS]), jnp.stack([shares[name] for name in LAYERS])


@jax.jit
def divergences(top: Params, dense: jax.Array, sparse: jax.Array) -> jax.Array:
    """Mean KL of each window from final hidden states, one window at a time."""
    return jax.lax.map(lambda pair: jnp.mean(kl_divergence(head(top, pair[0]), head(top, pair[1]))), (dense, sparse))


if __name__ == "__main__":
    main()
