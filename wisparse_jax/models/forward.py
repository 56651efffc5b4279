"""The arithmetic of a decoder on plain pytrees.

One code path serves training, evaluation, search and generation, dense and sparse: a block linear with a rule
skips channels, one without is dense; a forward with a cache continues a sequence, one without
starts it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.decode_attention.reference import rotate
from kernels_pallas.select.reference import rms_norm
from kernels_pallas.sparse_linear.reference import dot
from kernels_pallas.weight import Weight, as_weight
from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.parameters import Params as Params
from wisparse_jax.models.rules import LayerRules, Rules, ScaledRules, layer_skips


class BlockCache(NamedTuple):
    """Keys and values of one block; slot s of row b holds position `s - start[b]`."""

    keys: Float[Array, "batch slots kv_heads head_dim"]
    values: Float[Array, "batch slots kv_heads head_dim"]


Cache = list[BlockCache]


class Layout(NamedTuple):
    """Where the tokens of a forward stand; shared by all blocks."""

    offset: Int[Array, ""]  # the cache slot of the first token
    cos: Float[Array, "batch length half"]
    sin: Float[Array, "batch length half"]
    positions: Int[Array, "batch length"]  # slot - start, negative on left padding
    start: Int[Array, " batch"]


def empty_cache(config: LlamaConfig, batch: int, slots: int, dtype: Any) -> Cache:
    """A cache of zeros with room for `slots` tokens a row."""
    shape = (batch, slots, config.num_kv_heads, config.head_dim)
    return [BlockCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_blocks)]


def layout(
    config: LlamaConfig,
    batch: int,
    length: int,
    offset: Int[Array, ""] | int = 0,
    start: Int[Array, " batch"] | None = None,
) -> Layout:
    """Positions and rotary angles of `length` tokens a row that occupy slots `offset .. offset + length - 1`."""
    begin = jnp.zeros(batch, jnp.int32) if start is None else start.astype(jnp.int32)
    offset = jnp.asarray(offset, jnp.int32)
    positions = (offset + jnp.arange(length, dtype=jnp.int32))[None] - begin[:, None]
    cos, sin = config.rope.angles(positions, config.head_dim)
    return Layout(offset, cos, sin, positions, begin)


def attend(
    config: LlamaConfig,
    window: int | None,
    where: Layout,
    query: Float[Array, "batch length heads head_dim"],
    keys: Float[Array, "batch slots kv_heads head_dim"],
    values: Float[Array, "batch slots kv_heads head_dim"],
) -> Float[Array, "batch length features"]:
    """Causal grouped-query attention over the slots of a row, softmax in float32."""
    batch, length = query.shape[:2]
    precision = lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
    # Heads first and a group's queries as rows of one matrix: XLA's CPU products of such operands take half the time.
    grouped = query.reshape(batch, length, config.num_kv_heads, -1, config.head_dim).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch, config.num_kv_heads, -1, config.head_dim)
    scores = jnp.matmul(rows, keys.transpose(0, 2, 3, 1), precision=precision, preferred_element_type=jnp.float32)
    scores = scores.reshape(*grouped.shape[:4], -1)
    visible = _visible(window, where, keys.shape[1])[:, None, None]
    scores = jnp.where(visible, scores * config.head_dim**-0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype).reshape(*rows.shape[:3], -1)
    out = jnp.matmul(weights, values.transpose(0, 2, 1, 3), precision=precision).reshape(grouped.shape)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1)


def _visible(window: int | None, where: Layout, slots: int) -> Bool[Array, "batch length slots"]:
    """Which slots a query sees: from its row's start to itself, at most `window` of them."""
    slot_positions = jnp.arange(slots, dtype=jnp.int32)[None] - where.start[:, None]
    behind = where.positions[:, :, None] - slot_positions[:, None, :]
    seen = (behind >= 0) & (slot_positions[:, None, :] >= 0)
    return seen if window is None else seen & (behind < window)


def block(
    config: LlamaConfig,
    window: int | None,
    params: Params,
    x: Float[Array, "batch length hidden"],
    where: Layout,
    cache: BlockCache | None = None,
    rules: LayerRules | None = None,
    record: dict[str, Any] | None = None,
) -> tuple[Float[Array, "batch length hidden"], BlockCache]:
    """One decoder block: attention and MLP, each added to the residual stream.

    Args:
        window: the block's sliding window, or None.
        params: the block's entry of `params["blocks"]`.
        x: the residual stream.
        where: positions of the tokens, from `layout`.
        cache: keys and values of earlier slots, or None when the tokens start at slot 0.
        rules: what each layer does at these positions; None runs dense.
        record: if given, receives the input of each linear layer under the layer's name.

    Returns:
        The new residual stream, and the cache with this forward's keys and values in it.
    """
    attention, cache = self_attention(config, window, params, x, where, cache, rules, record)
    return after_attention(config, params, x, attention, rules, record), cache


def self_attention(
    config: LlamaConfig,
    window: int | None,
    params: Params,
    x: Float[Array, "batch length hidden"],
    where: Layout,
    cache: BlockCache | None = None,
    rules: LayerRules | None = None,
    record: dict[str, Any] | None = None,
) -> tuple[Float[Array, "batch length features"], BlockCache]:
    """What attention hands to the o projection, and the cache; see `block` for the arguments."""
    linear = functools.partial(_linear, params, rules, record)

    def heads(name: str, inputs: Array) -> Array:
        return linear(name, inputs).reshape(*inputs.shape[:2], -1, config.head_dim)

    with jax.named_scope("attention"):
        normed = rms_norm(x, params["attn_norm"], config.norm_eps)
        query, key, value = heads("q", normed), heads("k", normed), heads("v", normed)
        return attention_of(config, window, params, where, cache, query, key, value)


def attention_of(
    config: LlamaConfig,
    window: int | None,
    params: Params,
    where: Layout,
    cache: BlockCache | None,
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
) -> tuple[Float[Array, "batch length features"], BlockCache]:
    """`self_attention` from the products of q, k and v on: their norms, rotation, the cache, and attention."""
    if config.qk_norm:
        query = rms_norm(query, params["q_norm"], config.norm_eps)
        key = rms_norm(key, params["k_norm"], config.norm_eps)
    query, key = rotate(query, where.cos, where.sin), rotate(key, where.cos, where.sin)
    if cache is not None:
        at = (0, where.offset, 0, 0)
        key = lax.dynamic_update_slice(cache.keys, key, at)
        value = lax.dynamic_update_slice(cache.values, value, at)
    return attend(config, window, where, query, key, value), BlockCache(key, value)


def after_attention(
    config: LlamaConfig,
    params: Params,
    x: Float[Array, "batch length hidden"],
    attention: Float[Array, "batch length features"],
    rules: LayerRules | None = None,
    record: dict[str, Any] | None = None,
) -> Float[Array, "batch length hidden"]:
    """The rest of a block, from the o projection on; see `block` for the arguments."""
    linear = functools.partial(_linear, params, rules, record)
    with jax.named_scope("attention"):
        x = x + linear("o", attention)
    with jax.named_scope("mlp"):
        normed = rms_norm(x, params["mlp_norm"], config.norm_eps)
        return x + linear("down", jax.nn.silu(linear("gate", normed)) * linear("up", normed))


def _linear(params: Params, rules: LayerRules | None, record: dict[str, Any] | None, name: str, inputs: Array) -> Array:
    """One linear layer of a block, dense or by its rule."""
    if record is not None:
        record[name] = inputs
    layer, rule = params[name], None if rules is None else rules[name]
    weight = Weight.of(layer)
    out = dot(inputs, weight) if rule is None else rule.product(inputs, weight)
    if "bias" in layer:
        out = out + lax.broadcast_to_rank(layer["bias"], out.ndim)
    if rule is None or rule.bias is None:
        return out
    return out + lax.broadcast_to_rank(rule.bias.astype(out.dtype), out.ndim)


def hidden_states(
    config: LlamaConfig,
    params: Params,
    tokens: Int[Array, "batch length"],
    where: Layout,
    cache: Cache | None = None,
    rules: Rules | ScaledRules | None = None,
    records: list[dict[str, Any]] | None = None,
) -> tuple[Float[Array, "batch length hidden"], Cache]:
    """The final normed hidden states, and the cache; see `block` for the arguments.

    `records`, if given, receives one `record` of linear inputs per block.
    """
    x = params["embed"][tokens]
    new = []
    for i, weights in enumerate(params["blocks"]):
        record = None
        if records is not None:
            records.append(record := {})
        with jax.named_scope(f"block_{i}"):
            x, kept = block(
                config,
                config.windows[i],
                weights,
                x,
                where,
                None if cache is None else cache[i],
                None if rules is None else rules[i],
                record,
            )
        new.append(kept)
    return rms_norm(x, params["norm"], config.norm_eps), new


def top_params(params: Params) -> Params:
    """The parameters of the last norm and the head, which are no block's."""
    return {name: params[name] for name in ("norm", "lm_head", "embed") if name in params}


def head(params: Params, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
    """Logits of final hidden states, float32; a tied model multiplies with its embedding."""
    weight = params["lm_head"] if "lm_head" in params else params["embed"].T
    weight = Weight.of(weight) if isinstance(weight, dict) else as_weight(weight)
    one_row = hidden.size == hidden.shape[-1]
    if one_row and weight.format.column_scales:
        return lax.platform_dependent(hidden, weight, cuda=_one_row, default=dot).astype(jnp.float32)
    if one_row and "lm_head" not in params and hidden.dtype == jnp.float32:
        return lax.platform_dependent(hidden, weight, cpu=_row_of_a_tied_head, default=dot)
    return dot(hidden, weight).astype(jnp.float32)


def _row_of_a_tied_head(hidden: Float[Array, "*ones hidden"], weight: Weight) -> Float[Array, "*ones vocab"]:
    """`dot` with the embedding as it lies, which a CPU reads five times as fast as transposed."""
    how = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    return jnp.matmul(weight.values.T, hidden.reshape(-1, 1), **how).reshape(*hidden.shape[:-1], -1)


def _one_row(hidden: Float[Array, "*ones hidden"], weight: Weight) -> Float[Array, "*ones vocab"]:
    """`dot` of one row as a sum over channels, which XLA reads the weights faster for than for its product on a GPU."""
    whole = jnp.sum(hidden.reshape(-1, 1).astype(jnp.float32) * weight.values.astype(jnp.float32), axis=0)
    scaled = whole if weight.scales is None else whole * weight.scales
    return scaled.astype(hidden.dtype).reshape(*hidden.shape[:-1], -1)


def token_logits(
    config: LlamaConfig,
    params: Params,
    tokens: Int[Array, " batch"],
    slot: Int[Array, ""],
    start: Int[Array, " batch"],
    cache: Cache,
    rules: Rules | ScaledRules | None,
    shares: list[Array] | None = None,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """The logits after one more token a row, and the cache with it.

    `shares`, if given beside rules, receives the share that each layer skipped for each row, `[batch, blocks, 7]`.
    """
    where = layout(config, len(tokens), 1, slot, start)
    records: list[dict[str, Any]] | None = None if shares is None else []
    hidden, cache = hidden_states(config, params, tokens[:, None], where, cache, rules, records)
    if shares is not None and records is not None and rules is not None:
        shares.append(layer_skips(rules, records, params["blocks"])[:, 0])
    return head(params, hidden[:, 0]), cache


@functools.partial(jax.jit, static_argnums=0)
def logits(
    config: LlamaConfig,
    params: Params,
    tokens: Int[Array, "batch length"],
    start: Int[Array, " batch"] | None = None,
    rules: Rules | None = None,
) -> Float[Array, "batch length vocab"]:
    """Next-token logits of whole sequences, float32; dense, or sparse at every position when given rules."""
    where = layout(config, tokens.shape[0], tokens.shape[1], start=start)
    return head(params, hidden_states(config, params, tokens, where, rules=rules)[0])
