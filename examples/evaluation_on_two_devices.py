"""Perplexity with windows spread over two devices; on a CPU two are simulated.

    python examples/evaluation_on_two_devices.py

The weights are on both, each scores half of the windows, and XLA adds up.
"""

from __future__ import annotations

import os

# Before JAX is imported; on a machine with two accelerators this line has no effect.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import wisparse_jax as ws
from wisparse_jax.inference import sample_windows
from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.forward import logits


@functools.partial(jax.jit, static_argnums=0)
def perplexity(config: LlamaConfig, params: Any, windows: jax.Array) -> jax.Array:
    """Of every token after the first of each window."""
    log_probs = jax.nn.log_softmax(logits(config, params, windows)[:, :-1])
    return jnp.exp(-jnp.take_along_axis(log_probs, windows[:, 1:, None], axis=-1).mean())


def main() -> None:
    """Score the demo model on its own text, on two devices and on one."""
    model = ws.load("demo", dtype="float32")
    windows = sample_windows(model, windows=8, length=64, seed=0)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    everywhere, spread = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    params, rows = jax.device_put(model.params, everywhere), jax.device_put(windows, spread)
    on_two = perplexity(model.config, params, rows)
    on_one = perplexity(model.config, model.params, jnp.asarray(windows))
    print(f"{len(on_two.sharding.device_set)} devices: perplexity {on_two:.4f}; one device: {on_one:.4f}")
    np.testing.assert_allclose(on_two, on_one, rtol=1e-5)


if __name__ == "__main__":
    main()
