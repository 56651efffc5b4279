"""Perplexity with windows spread over two devices; on a CPU two are simulated.

    python examples/evaluation_on_two_devices.py

The weights are on both, and each scores half of the windows. `mesh="model=2"` would give each half of the weights.
"""

from __future__ import annotations

import os

# Before JAX is imported; on a machine with two accelerators this line has no effect.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()

import jax
import numpy as np

import wisparse_jax as ws
from wisparse_jax.inference import sample_windows


def main() -> None:
    """Score the demo model on its own text, on two devices and on one."""
    # Of a machine whose devices are two, mesh="data=2" says the same.
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    one, two = ws.load("demo", dtype="float32"), ws.load("demo", dtype="float32", mesh=mesh)
    windows = sample_windows(one, windows=8, length=64, seed=0)
    on_one, on_two = (ws.evaluate(model, windows).dense.perplexity.mean for model in (one, two))
    devices = len(two(windows).sharding.device_set)
    print(f"{devices} devices: perplexity {on_two:.4f}; one device: {on_one:.4f}")
    np.testing.assert_allclose(on_two, on_one, rtol=1e-5)


if __name__ == "__main__":
    main()
