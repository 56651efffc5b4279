"""Perplexity, divergence and realised sparsity of plans, against one dense run of the same windows."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float64, Int, Int32

from kernels_pallas.sparse_linear.reference import keep_mask
from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.divergence import kl_divergence, negative_log_likelihood
from wisparse_jax.models.forward import BlockCache, Cache, Params, block, head, layout, rms_norm, top_params
from wisparse_jax.models.llama import Llama
from wisparse_jax.models.mesh import data_size, mesh_of, on_host, spread
from wisparse_jax.models.rules import BlockRules, Rules
from wisparse_jax.models.tokens import token_windows
from wisparse_jax.sparsity.apply import SparseLlama

TOKENS_AT_ONCE = 2048


@dataclasses.dataclass(frozen=True, eq=False)
class Figure:
    """A mean over windows and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.error:.2g}"

    def __format__(self, spec: str) -> str:
        """Both numbers as `spec` says, such as `.4f`; a sign, as in `+.4f`, is the mean's."""
        return f"{self.mean:{spec}} ± {self.error:{spec.removeprefix('+')}}" if spec else str(self)

    @staticmethod
    def over(windows: Float64[np.ndarray, " windows"]) -> Figure:
        """The mean of one value per window, with the standard error of that mean (nan for a single window)."""
        n = len(windows)
        return Figure(float(windows.mean()), float(windows.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan)


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """How a model predicted each window's scored positions: mean negative log-likelihood, nats per token."""

    nll: Float64[np.ndarray, " windows"]

    @property
    def perplexity(self) -> Figure:
        """`exp` of the mean negative log-likelihood; its error by the delta method. Infinite beyond float64."""
        nll = Figure.over(self.nll)
        mean = math.exp(nll.mean) if nll.mean < 709 else math.inf
        return Figure(mean, mean * nll.error)


@dataclasses.dataclass(frozen=True, eq=False)
class SparseScore(Score):
    """The same for a sparse model, with its KL(dense || sparse) in nats per token and its realised sparsity."""

    kl: Float64[np.ndarray, " windows"]
    token_sparsity: Float64[np.ndarray, "windows positions"]
    layer_sparsity: Float64[np.ndarray, "blocks 7"]

    @property
    def divergence(self) -> Figure:
        """Mean KL(dense || sparse) per token."""
        return Figure.over(self.kl)

    @property
    def sparsity(self) -> Figure:
        """Realised sparsity, weighted by parameter count: mean over tokens and its standard error over windows."""
        return Figure.over(self.token_sparsity.mean(axis=1))


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """The scores of the dense model and of each plan on the same windows."""

    dense: Score
    sparse: dict[str, SparseScore]
    scored_positions: int  # per window
    window: int
    sparse_prefill: float

    @property
    def tokens(self) -> int:
        """How many positions were scored."""
        return len(self.dense.nll) * self.scored_positions

    def paired(self, first: str, second: str) -> Figure:
        """The mean difference in KL, first minus second, over the same windows, with its standard error."""
        return Figure.over(self.sparse[first].kl - self.sparse[second].kl)

    def as_json(self, name: str | None = None) -> dict[str, Any]:
        """The dense figures and, for one plan, the sparse ones; numbers that are not finite become null."""
        dense = self.dense.perplexity
        out: dict[str, Any] = {"dense_perplexity": dense.mean, "dense_perplexity_error": dense.error}
        if name is not None:
            score = self.sparse[name]
            for key, figure in (
                ("perplexity", score.perplexity),
                ("kl", score.divergence),
                ("sparsity", score.sparsity),
            ):
                out |= {key: figure.mean, f"{key}_error": figure.error}
            out["sparsity_spread"] = float(score.token_sparsity.std())
            out["layer_sparsity"] = [dict(zip(LAYERS, row, strict=True)) for row in score.layer_sparsity.tolist()]
        out |= {
            "tokens": self.tokens,
            "windows": len(self.dense.nll),
            "window": self.window,
            "sparse_prefill": self.sparse_prefill,
        }
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in out.items()}


def evaluate(
    model: Llama | SparseLlama,
    windows: Int[np.ndarray, "windows length"] | Int[Array, "windows length"],
    plans: Mapping[str, SparseLlama | Llama] | None = None,
    sparse_prefill: float = 0.5,
    progress: bool = False,
) -> Evaluation:
    """Score the dense model, and each plan, on windows of text.

    The last `sparse_prefill` of each window's positions runs sparse after a dense start, as in generation; all
    figures, dense ones too, are over those of them whose next token is in the window.

    Args:
        model: the dense model; a sparse one stands for itself under the name "plan".
        windows: token ids.
        plans: sparse forms of the model, by name; also dense ones with other weights, such as int8, which then run
            the positions that are scored.
        sparse_prefill: share of each window that runs sparse, above 0, at most 1.
        progress: show a progress bar on standard error.

    Raises:
        WisparseError: windows the model cannot read, or a share that leaves nothing to score.
    """
    if isinstance(model, SparseLlama):
        return evaluate(model.model, windows, {"plan": model}, sparse_prefill, progress)
    ids = token_windows(model.config, windows, "windows")
    length = ids.shape[1]
    if not 0 < sparse_prefill <= 1:
        raise WisparseError(f"sparse-prefill = {sparse_prefill}: expected a share above 0, at most 1")
    first = length - round(length * sparse_prefill)
    if length - first < 2:
        raise WisparseError(f"sparse-prefill = {sparse_prefill}: leaves nothing to score in windows of {length} tokens")

    params, config = model.params, model.config
    mesh = mesh_of(params)
    dense: list[np.ndarray] = []
    sparse: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in plans or {}}
    for batch in _bar(_batches(ids, mesh), progress):
        batch_ids, rows = batch
        hidden, cache = _dense(config, first, params, batch_ids)
        nll, reference = _predictions(config, top_params(params), hidden, batch_ids[:, first + 1 :])
        dense.append(_finite("dense", nll)[:rows])
        for name, plan in (plans or {}).items():
            rules = plan.rules if isinstance(plan, SparseLlama) else None
            # Values in another basis, or by rounded weights, are not the model's: such a plan starts by its own.
            own = cache if _same_weights(plan.params, params) else _dense(plan.config, first, plan.params, batch_ids)[1]
            out = _sparse(plan.config, first, plan.params, batch_ids, reference, own, rules)
            sparse[name].append(tuple(_finite(name, value).astype(np.float64)[:rows] for value in out))
    scores = {}
    for name, parts in sparse.items():
        nll, kl, by_token, by_layer = (np.concatenate(column) for column in zip(*parts, strict=True))
        scores[name] = SparseScore(nll, kl, by_token, by_layer.mean(axis=0))
    return Evaluation(
        Score(np.concatenate(dense).astype(np.float64)), scores, length - first - 1, length, float(sparse_prefill)
    )


def _finite(name: str, values: Array) -> np.ndarray:
    """What was measured, on the host; NaN and infinity are refused."""
    found = on_host(values)
    if not np.isfinite(found).all():
        raise WisparseError(f"{name}: the losses are not finite: the model's activations overflow on this text")
    return found


def _same_weights(one: Params, other: Params) -> bool:
    """Whether the blocks are the same arrays."""
    pairs = zip(jax.tree.leaves(one["blocks"]), jax.tree.leaves(other["blocks"]), strict=False)
    return len(one["blocks"]) == len(other["blocks"]) and all(a is b for a, b in pairs)


def _batches(ids: Int32[np.ndarray, "windows length"], mesh: Mesh | None = None) -> list[tuple[Array, int]]:
    """Windows in batches of one shape, the last filled up with its own last window, and how many rows are real.

    On a mesh every part of its data axis gets as many as a device would alone.
    """
    parts = data_size(mesh)
    size = parts * max(1, min(-(-len(ids) // parts), TOKENS_AT_ONCE // ids.shape[1]))
    starts = range(0, len(ids), size)
    return [
        (spread(mesh, ids[np.minimum(np.arange(at, at + size), len(ids) - 1)]), min(size, len(ids) - at))
        for at in starts
    ]


def _bar(batches: list, progress: bool) -> Iterable:
    from tqdm import tqdm

    return tqdm(batches, desc="evaluate", disable=not progress, leave=False)


# A program of one block serves all of them: whole models, unrolled, take minutes to compile.


def _dense(config: LlamaConfig, first: int, params: Params, ids: Int[Array, "batch length"]) -> tuple[Array, Cache]:
    """The final hidden states of the scored positions, before the norm, and the cache of the whole windows."""
    x, cache = params["embed"][ids], []
    for window, weights in zip(config.windows, params["blocks"], strict=True):
        x, own = _dense_block(config, window, weights, x)
        cache.append(own)
    return x[:, first:-1], cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def _dense_block(
    config: LlamaConfig, window: int | None, params: Params, x: Float[Array, "batch length hidden"]
) -> tuple[Float[Array, "batch length hidden"], BlockCache]:
    return block(config, window, params, x, layout(config, x.shape[0], x.shape[1]))


@functools.partial(jax.jit, static_argnums=0)
def _predictions(
    config: LlamaConfig,
    params: Params,
    x: Float[Array, "batch positions hidden"],
    targets: Int[Array, "batch positions"],
) -> tuple[Float[Array, " batch"], Float[Array, "batch positions vocab"]]:
    """Mean nll per window, and the logits."""
    logits = head(params, rms_norm(x, params["norm"], config.norm_eps))
    return jnp.mean(negative_log_likelihood(logits, targets), axis=1), logits


def _sparse(
    config: LlamaConfig,
    first: int,
    params: Params,
    ids: Int[Array, "batch length"],
    dense_logits: Float[Array, "batch positions vocab"],
    cache: Cache,
    rules: Rules | None,
) -> tuple[Array, Array, Float[Array, "batch positions"], Float[Array, "batch blocks 7"]]:
    """Per window: mean nll, mean KL, realised sparsity of each token and of each layer."""
    # The last position has no next token in the window, so nothing is scored there.
    x, shares = params["embed"][ids[:, first:-1]], []
    for b, weights in enumerate(params["blocks"]):
        own = None if rules is None else rules[b]
        x, share = _sparse_block(config, config.windows[b], first, weights, x, cache[b], own)
        shares.append(share)
    nll, logits = _predictions(config, top_params(params), x, ids[:, first + 1 :])
    return nll, *_compared(config, dense_logits, logits, shares)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sparse_block(
    config: LlamaConfig,
    window: int | None,
    first: int,
    params: Params,
    x: Float[Array, "batch positions hidden"],
    cache: BlockCache,
    rules: BlockRules | None,
) -> tuple[Float[Array, "batch positions hidden"], Float[Array, "batch positions 7"]]:
    """The block's output, and the share of channels that each layer skips for each token."""
    record: dict[str, Array] = {}
    out, _ = block(config, window, params, x, layout(config, x.shape[0], x.shape[1], first), cache, rules, record)

    def skipped(name: str) -> Float[Array, "batch positions"]:
        limits = None if rules is None else rules[name].thresholds
        if limits is None:
            return jnp.zeros(x.shape[:2], jnp.float32)
        kept: Bool[Array, "batch positions in"] = keep_mask(record[name], limits)
        return 1.0 - jnp.mean(kept.astype(jnp.float32), axis=-1)

    return out, jnp.stack([skipped(name) for name in LAYERS], axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _compared(
    config: LlamaConfig,
    dense_logits: Float[Array, "batch positions vocab"],
    logits: Float[Array, "batch positions vocab"],
    shares: list[Float[Array, "batch positions 7"]],
) -> tuple[Array, Float[Array, "batch positions"], Float[Array, "batch blocks 7"]]:
    share = jnp.stack(shares, axis=2)  # [batch, positions, blocks, 7]
    weights = jnp.asarray(config.layer_weights, jnp.float32)
    by_token = jnp.mean(share @ (weights / weights.sum()), axis=2)
    return jnp.mean(kl_divergence(dense_logits, logits), axis=1), by_token, jnp.mean(share, axis=1)
