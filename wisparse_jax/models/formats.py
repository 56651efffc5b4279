"""Which weight formats a model is offered in, and which one it has."""

from __future__ import annotations

from kernels_pallas.formats import FORMATS, Format
from kernels_pallas.weight import Weight
from wisparse_jax.errors import WisparseError
from wisparse_jax.models.parameters import Params

# Those that block linears and heads can be rounded to, by name, and those of which a text can say how.
ROUNDED = tuple(name for name, one in FORMATS.items() if one.scaled)
HEADS = tuple(name for name in ROUNDED if FORMATS[name].for_heads)
BY_TEXT = tuple(name for name in ROUNDED if FORMATS[name].by_text)


def check_offered(weights: str | None = None, head: str | None = None) -> None:
    """Refuse formats that block linears or a head cannot be rounded to.

    Raises:
        WisparseError: no such format.
    """
    for option, found, offered in (("weights", weights, ROUNDED), ("head", head, HEADS)):
        if found is not None and found not in offered:
            raise WisparseError(
                f"{option} = {found!r}: expected {one_of(offered)}, or nothing for the format that the model has"
            )


def one_of(names: tuple[str, ...]) -> str:
    """The names for a message."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def block_format(params: Params) -> Format:
    """What the block linears are stored in."""
    return Weight.of(params["blocks"][0]["q"]).format


def head_rounded(params: Params) -> bool:
    """Whether the head is rounded, as it has scales beside it then."""
    return isinstance(params.get("lm_head"), dict)


def is_rounded(params: Params) -> bool:
    """Whether block linears or the head are stored as integers."""
    return block_format(params).scaled or head_rounded(params)
