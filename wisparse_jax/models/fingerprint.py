"""A short name for a model: which architecture and which weights, whatever dtype they are loaded in."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.mesh import on_host
from wisparse_jax.models.parameters import flat

if TYPE_CHECKING:
    from wisparse_jax.models.model import Model

SAMPLES = 64  # elements of each tensor that count


def sample(array: Any) -> np.ndarray:
    """At most `SAMPLES` elements of an array (NumPy or JAX), evenly spaced from the first to the last, in bfloat16."""
    return in_bfloat16(array[sampled(array.shape)])


def sampled(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Where the elements of a `sample` are: their indices along each axis."""
    size = math.prod(shape)
    count = min(SAMPLES, size)
    # Up to the last element, not in strides of size / count: those would all fall in one column.
    positions = [i * (size - 1) // max(count - 1, 1) for i in range(count)]
    return tuple(axis.astype(np.int32) for axis in np.unravel_index(positions, shape))


def in_bfloat16(values: Any) -> np.ndarray:
    """The elements of a `sample` as they count."""
    return on_host(values).astype(np.float32).astype(ml_dtypes.bfloat16)


def architecture(config: LlamaConfig) -> dict[str, Any]:
    """What of a configuration makes a model another one, under the names that saved fingerprints were made with.

    Spelled out, so that neither a new field nor a renamed one of `LlamaConfig` refuses the plans and checkpoints that
    exist. A field that is added later goes in only where it is not at the value that every older model has.
    Where a text begins and ends is the tokenizer's business: other ids do not make it another model.
    """
    rope = config.rope
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_blocks": config.num_blocks,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "norm_eps": config.norm_eps,
        "rope": {
            "theta": rope.theta,
            "kind": rope.kind,
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_context": rope.original_context,
        },
        "context": config.context,
        "tied_embeddings": config.tied_embeddings,
        "qkv_bias": config.qkv_bias,
        "o_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "qk_norm": config.qk_norm,
        "windows": list(config.windows),
        "family": config.family,
    }


def digest(config: LlamaConfig, samples: dict[str, tuple[tuple[int, ...], np.ndarray]]) -> str:
    """The fingerprint from the shape and `sample` of every parameter, by path; arrays are `[in, out]`."""
    state = hashlib.sha256(json.dumps(architecture(config), sort_keys=True).encode())
    for path in sorted(samples):
        shape, values = samples[path]
        state.update(f"\n{path} {shape}\n".encode())
        state.update(values.view(np.uint16).astype("<u2").tobytes())
    return state.hexdigest()


def fingerprint(config: LlamaConfig, params: dict[str, Any]) -> str:
    """sha256 (64 hexadecimal digits) over the architecture and, for every tensor in a fixed order, its path, its
    shape and at most 64 evenly spaced elements rounded to bfloat16.

    Loads of one checkpoint in float32 and in bfloat16 agree; a load in float16 may differ, because it rounds first.
    """
    return digest(config, {path: (tuple(leaf.shape), sample(leaf)) for path, leaf in flat(params).items()})


def model_fingerprint(model: Model) -> str:
    """The fingerprint of the checkpoint a model was loaded from or, for one made otherwise or changed since, of its
    parameters."""
    return model.fingerprint or fingerprint(model.config, model.params)
