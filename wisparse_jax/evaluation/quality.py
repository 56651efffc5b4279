"""Perplexity, KL and realised sparsity of plans, against one dense run of the same windows."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int32

from wisparse_jax.arguments import check_count
from wisparse_jax.bars import bar
from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation.held import held_scores
from wisparse_jax.evaluation.scores import Evaluation, Score, SparseScore
from wisparse_jax.evaluation.shares import at_shares, check_rivals
from wisparse_jax.evaluation.windows import DENSE_FIRST
from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.control import Control
from wisparse_jax.models.forward import BlockCache, Cache, Params, block, head, layout, rms_norm, top_params
from wisparse_jax.models.kl import kl_divergence, negative_log_likelihood
from wisparse_jax.models.mesh import data_size, mesh_of, on_host, spread
from wisparse_jax.models.model import Model
from wisparse_jax.models.rules import BlockRules, Rules, layer_skips, mean_skipped
from wisparse_jax.models.tokens import token_windows

TOKENS_AT_ONCE = 2048


class DenseRun(NamedTuple):
    """A model's dense run over windows that are evaluated several times."""

    params: Params
    last: Float[Array, "windows positions hidden"]  # what leaves the last block, at the positions that run sparse
    cache: Cache  # of whole windows


def evaluate(
    model: Model,
    windows: Int[np.ndarray, "windows length"] | Int[Array, "windows length"],
    plans: Mapping[str, Model] | None = None,
    sparse_prefill: float = 0.5,
    progress: bool = False,
    hold: bool = False,
    dense_first: int = DENSE_FIRST,
    known: Sequence[DenseRun] = (),
    rivals: Mapping[str, str] | None = None,
) -> Evaluation:
    """Score the dense model, and each plan, on windows of text.

    The last `sparse_prefill` of each window's positions runs sparse after a dense start, as in generation; all
    figures, dense ones too, are over those of them whose next token is in the window.

    Args:
        model: the model whose dense run the others are compared with.
        windows: token ids.
        plans: sparse forms of the model, by name; also dense ones with other weights, such as int8, which then run
            the positions that are scored. None is a sparse model itself, under the name "plan".
        sparse_prefill: share of each window that runs sparse, above 0, at most 1.
        progress: show a progress bar on standard error.
        hold: keep what a plan skips at its target, as generation does (`models.control`); the positions run one by
            one then. False takes the plans' thresholds as they are.
        dense_first: so many of a window's first positions run dense, and are not scored, also where `sparse_prefill`
            would have them sparse.
        known: dense runs over the same windows, with the same share; models with their weights are not run again.
        rivals: the plan that a plan is compared with, by name, as `rivals_of` has them: what plans skip depends on the
            text, so that they are scored at the share that their rival skips as well. It takes two or three runs more.

    Raises:
        WisparseError: windows the model cannot read, a share that leaves nothing to score, a sparse model without a
            plan whose target could be held, or a rival that is none.
    """
    if plans is None:
        plans = {} if model.rules is None else {"plan": model}
    ids = token_windows(model.config, windows, "windows")
    length = ids.shape[1]
    if not 0 < sparse_prefill <= 1:
        raise WisparseError(f"sparse-prefill = {sparse_prefill}: expected a share above 0, at most 1")
    first = max(length - round(length * sparse_prefill), check_count(dense_first, "dense-first", least=0))
    if length - first < 2:
        raise WisparseError(f"sparse-prefill = {sparse_prefill}: leaves nothing to score in windows of {length} tokens")

    rivals = {} if rivals is None else dict(rivals)
    check_rivals(plans, rivals, hold)
    dense, sparse = _run(model, ids, first, plans, progress, hold, known)
    matched = at_shares(
        lambda models: _run(model, ids, first, models, progress, False, known)[1],
        plans, sparse, {name: sparse[rival].sparsity.mean for name, rival in rivals.items()},
    )  # fmt: skip
    return Evaluation(dense, sparse, length - first - 1, length, float(sparse_prefill), rivals, matched)


def _run(
    model: Model,
    ids: Int32[np.ndarray, "windows length"],
    first: int,
    plans: Mapping[str, Model],
    progress: bool,
    hold: bool,
    known: Sequence[DenseRun],
) -> tuple[Score, dict[str, SparseScore]]:
    """All windows once, dense and with each plan; `first` is the first position that runs sparse."""
    params, config = model.params, model.config
    mesh = mesh_of(params)
    dense: list[np.ndarray] = []
    sparse: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in plans}
    for batch in _bar(_batches(ids, mesh), progress):
        batch_ids, rows, chosen = batch
        hidden, cache = _dense(config, first, params, batch_ids, chosen, known)
        nll, reference = _predictions(config, top_params(params), hidden, batch_ids[:, first + 1 :])
        dense.append(_finite("dense", nll)[:rows])
        for name, plan in plans.items():
            # Values in another basis, or by rounded weights, are not the model's: such a plan starts by its own.
            own = cache
            if not _same_weights(plan.params, params):
                _, own = _dense(plan.config, first, plan.params, batch_ids, chosen, known)
            arguments = plan.config, first, plan.params, batch_ids, reference, own, plan.rules
            if hold and plan.rules is not None:
                target = _target(name, plan)
                out = held_scores(*arguments, Control.start(target, True, len(batch_ids), mesh))
            else:
                out = _sparse(*arguments)
            sparse[name].append(tuple(_finite(name, value).astype(np.float64)[:rows] for value in out))
    scores = {}
    for name, parts in sparse.items():
        nll, kl, by_token, by_layer = (np.concatenate(column) for column in zip(*parts, strict=True))
        scores[name] = SparseScore(nll, kl, by_token, by_layer.mean(axis=0))
    return Score(np.concatenate(dense).astype(np.float64)), scores


def _target(name: str, model: Model) -> float:
    if model.plan is None:
        raise WisparseError(f"{name}: hold: expected a model with its plan, which says what to skip; found rules alone")
    return model.plan.target


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


def _batches(ids: Int32[np.ndarray, "windows length"], mesh: Mesh | None = None) -> list[tuple[Array, int, np.ndarray]]:
    """Windows in batches of one shape, the last filled up with its own last window, how many rows are real, and which
    windows they are.

    On a mesh every part of its data axis gets as many as a device would alone.
    """
    parts = data_size(mesh)
    size = parts * max(1, min(-(-len(ids) // parts), TOKENS_AT_ONCE // ids.shape[1]))
    starts = range(0, len(ids), size)
    chosen = [np.minimum(np.arange(at, at + size), len(ids) - 1) for at in starts]
    return [(spread(mesh, ids[rows]), min(size, len(ids) - at), rows) for at, rows in zip(starts, chosen, strict=True)]


def _bar(batches: list, progress: bool) -> Iterable:
    return bar(batches, desc="evaluate", disable=not progress, leave=False)


# A program of one block serves all of them: whole models, unrolled, take minutes to compile.


def _dense(
    config: LlamaConfig,
    first: int,
    params: Params,
    ids: Int[Array, "batch length"],
    chosen: np.ndarray,
    known: Sequence[DenseRun],
) -> tuple[Array, Cache]:
    """The final hidden states of the scored positions, before the norm, and the cache of the whole windows."""
    for run in known:
        if _same_weights(run.params, params):
            return run.last[chosen, first - ids.shape[1] : -1], jax.tree.map(lambda a: a[chosen], run.cache)
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
    """The block's output, and the share of channels, or of bits of planes, that each layer skips for each token."""
    record: dict[str, Array] = {}
    out, _ = block(config, window, params, x, layout(config, x.shape[0], x.shape[1], first), cache, rules, record)
    if rules is None:
        return out, jnp.zeros((*x.shape[:2], len(LAYERS)), jnp.float32)
    return out, layer_skips([rules], [record], [params])[..., 0, :]


@functools.partial(jax.jit, static_argnums=0)
def _compared(
    config: LlamaConfig,
    dense_logits: Float[Array, "batch positions vocab"],
    logits: Float[Array, "batch positions vocab"],
    shares: list[Float[Array, "batch positions 7"]],
) -> tuple[Array, Float[Array, "batch positions"], Float[Array, "batch blocks 7"]]:
    share = jnp.stack(shares, axis=2)  # [batch, positions, blocks, 7]
    by_token = mean_skipped(config, share)
    return jnp.mean(kl_divergence(dense_logits, logits), axis=1), by_token, jnp.mean(share, axis=1)
