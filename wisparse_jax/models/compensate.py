"""Weights that make up for their own rounding errors, from what the layers read on a text; int4's do.

Rounding a weight to the nearest looks at the weight alone. Here the error of the layer's output counts, over the inputs
X of a text: input channel after input channel is rounded, and the error of each is spread over the channels that are
still to come so that `|X W - X W_rounded|^2` is least (GPTQ, Frantar et al. 2022, arXiv 2210.17323, section 3.3). The
scales of a channel's row are found when its turn has come, so their groups along the outputs are no obstacle.

The inputs are those of the model whose earlier layers are rounded already. What these changed is made up for as well:
the weights that are rounded are those of the least squares from the rounded model's inputs to the outputs that the
model had as it was.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from kernels_pallas.formats import FORMATS
from kernels_pallas.weight import Weight
from wisparse_jax.models.config import INPUT_GROUPS, LlamaConfig
from wisparse_jax.models.finite import check_activations
from wisparse_jax.models.forward import Params, block, layout
from wisparse_jax.models.quantise import check_columns

# Added to the diagonal of an inputs' Gram matrix, in units of its mean: for rounding, and for the outputs' regression,
# which would otherwise follow the text's noise.
DAMPING, TARGET_DAMPING = 0.01, 0.1
# Input channels between two updates of all that are still to come.
CHANNELS_AT_ONCE = 64
TOKENS_AT_ONCE = 4096

_dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnums=2)
def compensated(
    kernels: list[Float[Array, "in_channels _"]], gram: Float[Array, "in_channels in_channels"], kind: str
) -> list[Weight]:
    """Kernels of the same input in a format, each input channel's rounding error spread over the channels behind it.

    Args:
        kernels: of linear layers, `[in, out]` in any float dtype.
        gram: `X^T X` of what they read, float32.
        kind: the format, of `formats.BY_TEXT`.

    Raises:
        WisparseError: columns that the format cannot hold.
    """
    form, size_in, sizes = FORMATS[kind], len(gram), [kernel.shape[1] for kernel in kernels]
    for size in sizes:
        check_columns(kind, size)
    # Channels that nothing reads fill up the last batch.
    padding = -size_in % CHANNELS_AT_ONCE
    gram = jnp.pad(_damped(gram, DAMPING), ((0, padding), (0, padding)))
    gram = gram + jnp.diag((jnp.arange(len(gram)) >= size_in).astype(jnp.float32))
    wide = [jnp.pad(kernel.astype(jnp.float32), ((0, padding), (0, 0))) for kernel in kernels]
    # gram = R R^T with R upper, by Cholesky from the last channel to the first; then gram^-1 = U^T U with U = R^-1.
    upper = jnp.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1]
    factor = jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(gram)), lower=False)

    def batch(wide: list[Array], first: Array) -> tuple[list[Array], list[tuple[Array, Array]]]:
        own = lax.dynamic_slice(factor, (first, 0), (CHANNELS_AT_ONCE, len(gram)))
        among = lax.dynamic_slice(own, (0, first), (CHANNELS_AT_ONCE, CHANNELS_AT_ONCE))

        def channel(rows: list[Array], i: Array) -> tuple[list[Array], list[tuple[Array, Array, Array]]]:
            left, made = [], []
            for own_rows, size in zip(rows, sizes, strict=True):
                numbers, scales = form.nearest(own_rows[i])
                error = (own_rows[i] - numbers * jnp.repeat(scales, form.group or size)[:size]) / among[i, i]
                left.append(own_rows - jnp.outer(among[i], error))
                made.append((numbers, scales, error))
            return left, made

        rows = [lax.dynamic_slice_in_dim(one, first, CHANNELS_AT_ONCE) for one in wide]
        _, made = lax.scan(channel, rows, jnp.arange(CHANNELS_AT_ONCE))
        # Rows that are rounded change too, and are not looked at again.
        left = [one - _dot(own.T, errors) for one, (_, _, errors) in zip(wide, made, strict=True)]
        return left, [(numbers, scales) for numbers, scales, _ in made]

    _, made = lax.scan(batch, wide, jnp.arange(0, len(gram), CHANNELS_AT_ONCE))
    rows = [[part.reshape(len(gram), -1)[:size_in] for part in one] for one in made]
    return [Weight(*form.pack(numbers, scales)) for numbers, scales in rows]


def compensated_params(
    config: LlamaConfig, params: Params, kind: str, windows: Int32[np.ndarray, "windows length"], dtype: Any = None
) -> Params:
    """The parameters with every block linear in a format, rounded by `compensated` on what the windows make it read.

    Block by block: memory holds the model, its rounded form, the stream of all windows twice, and the work of one block
    on a few of them.

    Args:
        config: of the model.
        params: its parameters in float dtypes; what is not rounded is shared.
        kind: the format, of `formats.BY_TEXT`.
        windows: of text.
        dtype: to run the model in; None is that of the embedding.

    Raises:
        WisparseError: a layer that cannot be in the format, or activations that overflow, with the block.
    """
    dtype = params["embed"].dtype if dtype is None else dtype
    together = max(1, TOKENS_AT_ONCE // windows.shape[1])
    # Of the rounded model and of the model as it was.
    streams = [params["embed"][windows[i : i + together]].astype(dtype) for i in range(0, len(windows), together)]
    originals = list(streams)
    blocks = []
    for b, stored in enumerate(params["blocks"]):
        run = functools.partial(_run_block, config, config.windows[b])
        original_block = jax.tree.map(lambda a: a.astype(dtype), stored)
        rounded, made = dict(original_block), dict(stored)
        for group, layers in INPUT_GROUPS.items():
            gram, crossed = jnp.zeros(()), jnp.zeros(())
            for stream, original in zip(streams, originals, strict=True):
                read = run(rounded, stream, group)
                gram, crossed = _add_products(gram, crossed, read, run(original_block, original, group))
            check_activations(b, {group: gram}, gram, "the calibration text")
            targets = _targets([stored[name]["kernel"] for name in layers], gram, crossed)
            for name, weight in zip(layers, compensated(targets, gram, kind), strict=True):
                made[name] = stored[name] | weight.layer
                rounded[name] = original_block[name] | {"kernel": weight.wide(dtype)}
        streams = [run(rounded, stream) for stream in streams]
        originals = [run(original_block, original) for original in originals]
        blocks.append(jax.block_until_ready(made))
    return params | {"blocks": blocks}


def _damped(gram: Array, share: float) -> Array:
    return gram + share * jnp.mean(jnp.diagonal(gram)) * jnp.eye(len(gram))


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _run_block(
    config: LlamaConfig,
    window: int | None,
    params: Params,
    x: Float[Array, "windows length hidden"],
    group: str | None = None,
) -> Array:
    """What the block hands on, or what the layers of a group read; XLA leaves out what comes behind that."""
    record: dict[str, Any] = {}
    out, _ = block(config, window, params, x, layout(config, x.shape[0], x.shape[1]), record=record)
    return out if group is None else record[INPUT_GROUPS[group][0]]


@jax.jit
def _add_products(gram: Array, crossed: Array, read: Array, original: Array) -> tuple[Array, Array]:
    rows, others = (a.reshape(-1, a.shape[-1]).astype(jnp.float32) for a in (read, original))
    return gram + _dot(rows.T, rows), crossed + _dot(rows.T, others)


@jax.jit
def _targets(kernels: list[Array], gram: Array, crossed: Array) -> list[Array]:
    """The weights that give the original outputs from the rounded model's inputs, by ridge regression around W."""
    factor = jax.scipy.linalg.cho_factor(_damped(gram, TARGET_DAMPING))
    wide = [kernel.astype(jnp.float32) for kernel in kernels]
    return [kernel + jax.scipy.linalg.cho_solve(factor, _dot(crossed - gram, kernel)) for kernel in wide]
