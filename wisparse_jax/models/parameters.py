"""The parameters of a model, declared once: their names, logical axes and names in Hugging Face folders.

Shapes and initial values follow from the table, and so does how the parameters lie on several devices (`mesh.py`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

if TYPE_CHECKING:
    from wisparse_jax.models.config import LlamaConfig

Params = dict[str, Any]


class Parameter(NamedTuple):
    """One parameter of a model or of each of its blocks."""

    axes: tuple[str, ...]  # the logical axis of each dimension
    hf_name: str
    only_if: str | None = None  # the field of `LlamaConfig` that says whether a model has it


_BLOCK, _ATTENTION, _MLP = "model.layers.*", "model.layers.*.self_attn", "model.layers.*.mlp"

# By path, * the number of the block, in the order in which random values are drawn.
PARAMETERS = {
    "embed": Parameter(("vocab", "embed"), "model.embed_tokens.weight"),
    "blocks.*.attn_norm": Parameter(("embed",), f"{_BLOCK}.input_layernorm.weight"),
    "blocks.*.mlp_norm": Parameter(("embed",), f"{_BLOCK}.post_attention_layernorm.weight"),
    "blocks.*.q.kernel": Parameter(("embed", "heads"), f"{_ATTENTION}.q_proj.weight"),
    "blocks.*.q.bias": Parameter(("heads",), f"{_ATTENTION}.q_proj.bias", "qkv_bias"),
    "blocks.*.k.kernel": Parameter(("embed", "kv_heads"), f"{_ATTENTION}.k_proj.weight"),
    "blocks.*.k.bias": Parameter(("kv_heads",), f"{_ATTENTION}.k_proj.bias", "qkv_bias"),
    "blocks.*.v.kernel": Parameter(("embed", "kv_heads"), f"{_ATTENTION}.v_proj.weight"),
    "blocks.*.v.bias": Parameter(("kv_heads",), f"{_ATTENTION}.v_proj.bias", "qkv_bias"),
    "blocks.*.o.kernel": Parameter(("heads", "embed"), f"{_ATTENTION}.o_proj.weight"),
    "blocks.*.o.bias": Parameter(("embed",), f"{_ATTENTION}.o_proj.bias", "o_bias"),
    "blocks.*.gate.kernel": Parameter(("embed", "mlp"), f"{_MLP}.gate_proj.weight"),
    "blocks.*.gate.bias": Parameter(("mlp",), f"{_MLP}.gate_proj.bias", "mlp_bias"),
    "blocks.*.up.kernel": Parameter(("embed", "mlp"), f"{_MLP}.up_proj.weight"),
    "blocks.*.up.bias": Parameter(("mlp",), f"{_MLP}.up_proj.bias", "mlp_bias"),
    "blocks.*.down.kernel": Parameter(("mlp", "embed"), f"{_MLP}.down_proj.weight"),
    "blocks.*.down.bias": Parameter(("embed",), f"{_MLP}.down_proj.bias", "mlp_bias"),
    "blocks.*.q_norm": Parameter(("head_dim",), f"{_ATTENTION}.q_norm.weight", "qk_norm"),
    "blocks.*.k_norm": Parameter(("head_dim",), f"{_ATTENTION}.k_norm.weight", "qk_norm"),
    "norm": Parameter(("embed",), "model.norm.weight"),
    "lm_head": Parameter(("embed", "vocab"), "lm_head.weight", "own_head"),
}


def declared(path: str) -> Parameter:
    """The declaration of the parameter at a path such as `blocks.0.q.kernel`."""
    return PARAMETERS[re.sub(r"\d+", "*", path)]


def hf_name(path: str) -> str:
    """The Hugging Face name of the parameter at a path such as `blocks.0.q.kernel`."""
    number = re.search(r"\d+", path)
    name = declared(path).hf_name
    return name.replace("*", number.group()) if number else name


def flat(params: Any) -> dict[str, Any]:
    """The leaves of a parameter pytree by their path, such as `blocks.0.q.kernel`, in the order of `jax.tree`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def axis_sizes(config: LlamaConfig) -> dict[str, int]:
    """The size of every logical axis."""
    return {
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "mlp": config.intermediate_size,
        "head_dim": config.head_dim,
    }


def param_shapes(config: LlamaConfig, dtype: Any = jnp.float32) -> Params:
    """The plain parameter pytree with `jax.ShapeDtypeStruct` leaves: which parameters there are."""
    sizes = axis_sizes(config)
    shapes: Params = {}
    for path, parameter in PARAMETERS.items():
        if parameter.only_if is not None and not getattr(config, parameter.only_if):
            continue
        leaf = jax.ShapeDtypeStruct(tuple(sizes[axis] for axis in parameter.axes), jnp.dtype(dtype))
        first, *rest = path.split(".")
        if not rest:
            shapes[first] = leaf
            continue
        # A dict of its own for each block, so that a caller who changes one block's entry changes no other's.
        for block in shapes.setdefault(first, [{} for _ in range(config.num_blocks)]):
            *layer, name = rest[1:]
            (block.setdefault(layer[0], {}) if layer else block)[name] = leaf
    return shapes


def random_values(shapes: Any, rngs: nnx.Rngs, name: str = "") -> Any:
    """Arrays of the given shapes, in the order they are listed: small normal matrices, ones, and biases of zero."""
    if isinstance(shapes, dict):
        return {key: random_values(value, rngs, key) for key, value in shapes.items()}
    if isinstance(shapes, list):
        return [random_values(value, rngs) for value in shapes]
    if len(shapes.shape) == 2:
        return (0.02 * jax.random.normal(rngs.params(), shapes.shape, jnp.float32)).astype(shapes.dtype)
    return (jnp.zeros if name == "bias" else jnp.ones)(shapes.shape, shapes.dtype)
