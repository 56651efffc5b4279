"""Activations that are not finite, named by block and layer before anything is searched or scored with them."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from wisparse_jax.errors import WisparseError
from wisparse_jax.models.config import INPUT_GROUPS


def check_activations(
    block: int, inputs: Mapping[str, Float[Array, "..."]], out: Float[Array, "..."], text: str = "this text"
) -> None:
    """Refuse a block of which an input of a linear layer, or what it hands to the next one, is not finite.

    Args:
        block: its number.
        inputs: the input of each of `INPUT_GROUPS`, as recorded by `forward.block` (or its absolute value).
        out: the residual stream behind the block.
        text: what the model read, for the message.

    Raises:
        WisparseError: NaN or infinity; names the block and the first such layer.
    """
    finite = jax.device_get(_finite(dict(inputs), out))
    for group, layers in INPUT_GROUPS.items():
        if group in inputs and not finite[0][group]:
            raise _error(block, f"the input of layer {', '.join(layers)}", text, out)
    if not finite[1]:
        raise _error(block, "the output", text, out)


@jax.jit
def _finite(
    inputs: dict[str, Float[Array, "..."]], out: Float[Array, "..."]
) -> tuple[dict[str, Bool[Array, ""]], Bool[Array, ""]]:
    return {name: jnp.isfinite(x).all() for name, x in inputs.items()}, jnp.isfinite(out).all()


def _error(block: int, what: str, text: str, out: Array) -> WisparseError:
    return WisparseError(
        f"block {block}: {what} is not finite: expected numbers, found NaN or infinity; the dense model overflows in "
        f"{out.dtype} on {text}"
    )
