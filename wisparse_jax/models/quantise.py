"""Block linears in int8 or int4; see `Weight` for how they are stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.weight import GROUP, MIDDLE, Weight
from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.fingerprint import model_fingerprint
from wisparse_jax.models.forward import Params
from wisparse_jax.models.llama import Llama
from wisparse_jax.models.mesh import mesh_of, place_on
from wisparse_jax.models.tokens import token_windows

LARGEST = 127
# The scale of an int4 group is one of these shares of largest / 7.5, of either sign: whichever rounds the group best.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
SCALE_BITS = 5  # significant ones: times four bits of a weight, of which 8 needs one and 7 three, that is a bfloat16


@jax.jit
def quantise_int8(kernel: Float[Array, "in_channels out"]) -> Weight:
    """`round(W / scale)` and `scale = max_i |W_ij| / 127`, so that no weight is off by more than half a scale."""
    wide = kernel.astype(jnp.float32)
    # A column of zeros has any scale.
    scale = jnp.maximum(jnp.abs(wide).max(axis=0), jnp.finfo(jnp.float32).tiny * LARGEST) / LARGEST
    return Weight(jnp.round(wide / scale[None]).astype(jnp.int8), scale)


@jax.jit
def quantise_int4(kernel: Float[Array, "in_channels out"]) -> Weight:
    """`clip(round(W / scale), -8, 7)` for 128 columns of an input channel's row at a time.

    The scale is the one among a few with the least squared error of its group. With a negative one the largest weight
    may be the one that -8 stands for. No well-kept library's array type is used, as none has the bytes and the scales
    in the order in which the kernels read them.

    Raises:
        WisparseError: an odd number of columns.
    """
    check_columns(kernel.shape[1])
    return pack_int4(*nearest_int4(kernel.astype(jnp.float32)))


def check_columns(size_out: int) -> None:
    """Refuse what int4 bytes cannot hold.

    Raises:
        WisparseError: an odd number of columns.
    """
    if size_out % 2:
        raise WisparseError(f"int4 weights: expected an even number of columns, found {size_out}")


def nearest_int4(rows: Float[Array, "*rows out"]) -> tuple[Float[Array, "*rows out"], Float[Array, "*rows groups"]]:
    """Whole numbers from -8 to 7, and the scale of every 128 of them; to be called inside a jit."""
    size_out = rows.shape[-1]
    groups = -(-size_out // GROUP)
    # Padded with zeros, which every scale rounds to zeros.
    wide = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, groups * GROUP - size_out)])
    wide = wide.reshape(*rows.shape[:-1], groups, GROUP)
    largest = jnp.maximum(jnp.abs(wide).max(axis=-1), jnp.finfo(jnp.float32).tiny * 2.0**20)

    def rounded(scale: Array) -> Array:
        return jnp.clip(jnp.round(wide / scale[..., None]), -MIDDLE, MIDDLE - 1)

    best = least = None
    for share in SHARES:
        for sign in (1.0, -1.0):
            scale = _significant(sign * share / 7.5 * largest)
            error = jnp.square(rounded(scale) * scale[..., None] - wide).sum(axis=-1)
            if best is None or least is None:
                best, least = scale, error
            else:
                best, least = jnp.where(error < least, scale, best), jnp.minimum(error, least)
    assert best is not None
    return rounded(best).reshape(*rows.shape[:-1], -1)[..., :size_out], best


def pack_int4(numbers: Float[Array, "in_channels out"], scales: Float[Array, "in_channels groups"]) -> Weight:
    """The weight of `nearest_int4`'s numbers and scales."""
    halves = (numbers + MIDDLE).astype(jnp.uint8)
    return Weight(halves[:, ::2] | (halves[:, 1::2] << 4), scales.T.astype(jnp.bfloat16))


def _significant(scale: Array) -> Array:
    """Rounded to `SCALE_BITS` significant bits."""
    mantissa, exponent = jnp.frexp(scale)
    return jnp.ldexp(jnp.round(mantissa * 2**SCALE_BITS) / 2**SCALE_BITS, exponent)


KINDS: dict[str, Callable[[Array], Weight]] = {"int8": quantise_int8, "int4": quantise_int4}


def check_params(params: Params, kind: str | None, head: str | None) -> None:
    """Refuse kinds that there are not, and parameters that are rounded already; see `quantise_params`."""
    for name, found, offered in (("weights", kind, tuple(KINDS)), ("head", head, ("int8",))):
        if found is not None and found not in offered:
            raise WisparseError(f"{name} = {found!r}: expected {' or '.join(offered)}, or nothing to keep the model's")
    if (kind and "scale" in params["blocks"][0]["q"]) or (head and isinstance(params.get("lm_head"), dict)):
        raise WisparseError("the model's weights are rounded to integers already: load it as it is stored")


def quantise_params(params: Params, kind: str | None, head: str | None = None) -> Params:
    """The parameters with every block linear's kernel in int8 or int4 and its `scale` beside it; the rest is shared.

    Args:
        params: of a model.
        kind: "int8", "int4" or None, which leaves the block linears as they are.
        head: likewise for the head, "int8" or None; a tied model's becomes one beside its embedding.

    Raises:
        WisparseError: no such kind, or a layer that cannot have it.
    """
    check_params(params, kind, head)
    if head is not None:
        weight = quantise_int8(params["lm_head"] if "lm_head" in params else params["embed"].T)
        params = params | {"lm_head": {"kernel": weight.values, "scale": weight.scales}}
    if kind is None:
        return params
    blocks = []
    for block in params["blocks"]:
        made = dict(block)
        for name in LAYERS:
            weight = KINDS[kind](block[name]["kernel"])
            made[name] = block[name] | {"kernel": weight.values, "scale": weight.scales}
        blocks.append(made)
    return params | {"blocks": blocks}


def round_params(
    config: LlamaConfig, params: Params, kind: str | None, head: str | None, tokens: Any = None, dtype: Any = None
) -> Params:
    """As `quantise_params`; int4 weights make up for their errors on windows of token ids, if given any.

    Raises:
        WisparseError: see `quantise_params` and `compensate.compensated_params`; also tokens without int4 weights.
    """
    if tokens is None:
        return quantise_params(params, kind, head)
    if kind != "int4":
        raise WisparseError(f"weights = {kind!r}: expected int4 where a text is given to round them by")
    from wisparse_jax.models.compensate import compensated_params

    check_params(params, kind, head)
    with_head = quantise_params(params, None, head)
    return with_head | {"blocks": compensated_params(config, params, token_windows(config, tokens), dtype)["blocks"]}


def quantise(model: Llama, kind: str | None = "int8", head: str | None = None, tokens: Any = None) -> Llama:
    """The model with block linears in int8 or int4, or its head in int8; plans made for the model apply to it.

    Args:
        model: in float weights; also one folded into a plan's basis, `load(name, basis=plan.basis)`.
        kind: "int8", "int4" or None, which keeps the block linears.
        head: "int8" or None, which keeps the head.
        tokens: windows of text, int32 `[windows, length]`: int4 weights then make up for their rounding errors on what
            the layers read there (`compensate`); without, every weight is rounded to the nearest.

    Raises:
        WisparseError: see `quantise_params`; also tokens without int4 weights, or that the model cannot read.
    """
    params = round_params(model.config, model.params, kind, head, tokens)
    made = Llama.from_params(model.config, place_on(mesh_of(model.params), model.config, params))
    made.name, made.fingerprint, made.basis_digest = model.name, model_fingerprint(model), model.basis_digest
    return made
