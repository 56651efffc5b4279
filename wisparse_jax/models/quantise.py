"""Models in other weight formats, which `kernels_pallas.formats` has."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from kernels_pallas.formats import FORMATS
from kernels_pallas.weight import Weight
from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.models.formats import BY_TEXT, block_format, check_offered, head_rounded, one_of
from wisparse_jax.models.forward import Params
from wisparse_jax.models.model import Model
from wisparse_jax.models.tokens import token_windows


def rounded(kernel: Float[Array, "in_channels out"], kind: str) -> Weight:
    """A weight in a format, each number rounded to the nearest.

    Raises:
        WisparseError: columns that the format cannot hold.
    """
    check_columns(kind, kernel.shape[1])
    return _rounded(kernel, kind)


@functools.partial(jax.jit, static_argnums=1)
def _rounded(kernel: Float[Array, "in_channels out"], kind: str) -> Weight:
    return Weight(*FORMATS[kind].quantise(kernel))


def check_columns(kind: str, size_out: int) -> None:
    """Refuse columns that a format cannot hold.

    Raises:
        WisparseError: why not.
    """
    if (problem := FORMATS[kind].problem(size_out)) is not None:
        raise WisparseError(f"{kind} weights: {problem}")


def check_params(params: Params, kind: str | None, head: str | None) -> None:
    """Refuse formats that there are not, and parameters that are rounded already; see `quantise_params`."""
    check_offered(kind, head)
    if (kind and block_format(params).scaled) or (head and head_rounded(params)):
        raise WisparseError("the model's weights are rounded to integers already: load it as it is stored")


def quantise_params(params: Params, kind: str | None, head: str | None = None) -> Params:
    """The parameters with every block linear's kernel in a format and its `scale` beside it; the rest is shared.

    Args:
        params: of a model.
        kind: the format, of `formats.ROUNDED`, or None, which leaves the block linears as they are.
        head: likewise for the head, of `formats.HEADS`; a tied model's becomes one beside its embedding.

    Raises:
        WisparseError: no such kind, or a layer that cannot have it.
    """
    check_params(params, kind, head)
    if head is not None:
        weight = rounded(params["lm_head"] if "lm_head" in params else params["embed"].T, head)
        params = params | {"lm_head": weight.layer}
    if kind is None:
        return params
    blocks = []
    for block in params["blocks"]:
        layers = dict(block)
        for name in LAYERS:
            layers[name] = block[name] | rounded(block[name]["kernel"], kind).layer
        blocks.append(layers)
    return params | {"blocks": blocks}


def round_params(
    config: LlamaConfig, params: Params, kind: str | None, head: str | None, tokens: Any = None, dtype: Any = None
) -> Params:
    """The parameters in a format, rounded to the nearest, or to make up for the errors on windows of token ids.

    Raises:
        WisparseError: see `quantise_params` and `compensate.compensated_params`; also tokens for a format that cannot.
    """
    if tokens is None:
        return quantise_params(params, kind, head)
    if kind not in BY_TEXT:
        raise WisparseError(f"weights = {kind!r}: expected {one_of(BY_TEXT)} where a text is given to round them by")
    from wisparse_jax.models.compensate import compensated_params

    check_params(params, kind, head)
    with_head = quantise_params(params, None, head)
    compensated = compensated_params(config, params, kind, token_windows(config, tokens), dtype)
    return with_head | {"blocks": compensated["blocks"]}


def quantise(model: Model, kind: str | None = "int8", head: str | None = None, tokens: Any = None) -> Model:
    """The model with block linears or its head in another format; plans made for the model apply to it.

    Args:
        model: in float weights; also one folded into a plan's basis, `load(name, plan=plan).dense`.
        kind: of the block linears, such as "int8" or "int4" (`formats.ROUNDED`); None keeps them.
        head: of the head, "int8"; None keeps it.
        tokens: windows of text, int32 `[windows, length]`: int4 weights then make up for their rounding errors on what
            the layers read there (`compensate`); without, every weight is rounded to the nearest.

    Raises:
        WisparseError: see `quantise_params`; also a sparse model, tokens for other weights than int4, or that the model
            cannot read.
    """
    if model.rules is not None:
        raise WisparseError("expected a dense model: its plan is applied to the rounded weights, not before")
    params = round_params(model.config, model.params, kind, head, tokens)
    return model.with_weights(model.config, params, model.basis_digest)
