"""Another basis for the residual stream and for the values of attention, folded into the weights.

RMSNorm commutes with an orthogonal matrix Q once its gain is moved into the weights that read it, so a decoder computes
the same function with `E Q` for the embedding, `Q' diag(gain) W` for what reads the stream and `W Q` for what writes
it; and any orthogonal R of a key/value group's features goes between v and o. What changes is what the linears' inputs
look like: sparser ones lose less when channels are skipped. The input of down, after a product of two nonlinear
features, cannot be rotated. (QuaRot, arXiv 2404.00456, and SliceGPT, 2401.15024, fold rotations the same way.)
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.formats import is_rounded
from wisparse_jax.models.parameters import Params

_READERS = {"q": "attn_norm", "k": "attn_norm", "v": "attn_norm", "gate": "mlp_norm", "up": "mlp_norm"}
_WRITERS = ("o", "down")
_dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


class Basis(NamedTuple):
    """Orthogonal matrices, float32; a vector of the stream becomes `x @ stream`."""

    stream: Float[Array, "hidden hidden"]
    heads: Float[Array, "blocks kv_heads head_dim head_dim"]

    def digest(self) -> str:
        """sha256 of the numbers, which tells one folded model from another."""
        state = hashlib.sha256()
        for matrix in self:
            state.update(np.ascontiguousarray(np.asarray(matrix, "<f4")).tobytes())
        return state.hexdigest()


def identity_basis(config: LlamaConfig) -> Basis:
    """The basis that a model has."""
    shape = (config.num_blocks, config.num_kv_heads, config.head_dim, config.head_dim)
    return Basis(jnp.eye(config.hidden_size), jnp.broadcast_to(jnp.eye(config.head_dim), shape))


def folded_config(config: LlamaConfig) -> LlamaConfig:
    """The configuration of a folded model: its head is never tied, since it takes the last norm's gain."""
    return dataclasses.replace(config, tied_embeddings=False)


def fold(config: LlamaConfig, params: Params, basis: Basis, consume: bool = False) -> Params:
    """The parameters of the same function in another basis; products in float32, rounded once to each tensor's dtype.

    A tied model's embedding becomes two matrices, one of them a head: `vocab_size * hidden_size` weights more to keep,
    none more to read for a token.

    Args:
        config: of the model as it is.
        params: its parameters, which stay as they are.
        basis: to fold in.
        consume: take every tensor out of `params` as it is folded, so that memory holds the model and one tensor.

    Raises:
        WisparseError: weights that are rounded; that comes after folding.
    """
    if is_rounded(params):
        raise WisparseError("weights that are rounded already cannot be folded into a basis: folding comes first")
    take = dict.pop if consume else dict.__getitem__
    q, embed = basis.stream, take(params, "embed")
    head, gain = take(params, "lm_head") if "lm_head" in params else None, take(params, "norm")
    out: Params = {"lm_head": _read(q, gain, embed.T if head is None else head)}
    del head
    out["embed"], out["norm"] = _write(embed, q), jnp.ones_like(gain)
    del embed
    blocks, count = take(params, "blocks"), config.num_blocks
    out["blocks"] = []
    for b in range(count):
        block = blocks[b]
        out["blocks"].append(_fold_block(config, block, q, basis.heads[b], take))
        if consume:
            blocks[b] = None
    return out


def _fold_block(config: LlamaConfig, block: Params, q: Array, r: Array, take: Any) -> Params:
    out: Params = {}
    gains = {norm: take(block, norm) for norm in ("attn_norm", "mlp_norm")}
    for name in list(block):
        part = take(block, name)
        if name in _READERS:
            out[name] = part | {"kernel": _read(q, gains[_READERS[name]], part["kernel"])}
            if name == "v":
                out[name] = {key: _values(value, r) for key, value in out[name].items()}
        elif name in _WRITERS:
            out[name] = {key: _write(value, q) for key, value in part.items() if key != "kernel"}
            rows = r if name == "o" else None
            out[name]["kernel"] = _write(part["kernel"], q, rows, config.num_heads)
        elif name not in gains:
            out[name] = part
    return out | {norm: jnp.ones_like(gain) for norm, gain in gains.items()}


@jax.jit
def _read(q: Array, gain: Array, kernel: Array) -> Array:
    return _dot(q.T, gain.astype(jnp.float32)[:, None] * kernel.astype(jnp.float32)).astype(kernel.dtype)


@functools.partial(jax.jit, static_argnums=3)
def _write(kernel: Array, q: Array, r: Array | None = None, heads: int = 0) -> Array:
    """What writes the stream; with r, the rows of o, each head in its group's basis."""
    wide = kernel.astype(jnp.float32)
    if r is not None:
        groups, size = r.shape[:2]
        rows = wide.reshape(groups, heads // groups, size, -1)
        wide = jnp.einsum("kde,kgdh->kgeh", r, rows, precision=lax.Precision.HIGHEST).reshape(kernel.shape)
    return _dot(wide, q).astype(kernel.dtype)


@jax.jit
def _values(tensor: Array, r: Array) -> Array:
    """The columns of v, or its bias, in each group's basis."""
    grouped = tensor.astype(jnp.float32).reshape(-1, *r.shape[:2])
    turned = jnp.einsum("nkd,kde->nke", grouped, r, precision=lax.Precision.HIGHEST)
    return turned.reshape(tensor.shape).astype(tensor.dtype)
