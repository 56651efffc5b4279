"""Rotary position embeddings: the `default`, `linear` and `llama3` frequency rules."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wisparse_jax.errors import ConfigError

_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """A rule for the rotary frequencies; `factor` and the rest are read by the scaled kinds only."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    @staticmethod
    def parse(raw: dict[str, Any], context: int) -> Rope:
        """Read `rope_parameters`, or the older `rope_theta` and `rope_scaling`, of a `config.json`."""
        field = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
        given = raw.get(field)
        given = {} if given is None else given
        if not isinstance(given, dict):
            raise ConfigError(f"{field}: expected an object, found {given!r}")
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in _NEEDED:
            raise ConfigError(f"{field}.rope_type = {kind!r} is not supported; expected one of {', '.join(_NEEDED)}")
        if given.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
            raise ConfigError(f"{field}.partial_rotary_factor: only 1.0 is supported")
        values = {"original_max_position_embeddings": context, **given}
        for name in _NEEDED[kind]:
            value = values.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"{field}.{name}: expected a positive number, found {value!r}")
        theta = given.get("rope_theta", raw.get("rope_theta", 10000.0))
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < math.inf:
            raise ConfigError(f"rope_theta: expected a number above 1, found {theta!r}")
        if kind == "default":
            return Rope(float(theta))
        if kind == "linear":
            return Rope(float(theta), kind, float(values["factor"]))
        low, high = float(values["low_freq_factor"]), float(values["high_freq_factor"])
        if low >= high:
            raise ConfigError(f"{field}.low_freq_factor = {low} must be below high_freq_factor = {high}")
        original = int(values["original_max_position_embeddings"])
        return Rope(float(theta), kind, float(values["factor"]), low, high, original)

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each of the `head_dim / 2` rotated pairs, float32.

        `llama3` divides by `factor` the wavelengths longer than `original_context / low_freq_factor`, keeps those
        shorter than `original_context / high_freq_factor` and interpolates in between.
        """
        # float32 throughout, as the published implementations: at long positions a rounding in f is visible.
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        f = (np.float32(1.0) / (np.float32(self.theta) ** exponent)).astype(np.float32)
        if self.kind == "linear":
            f = f / np.float32(self.factor)
        elif self.kind == "llama3":
            wavelength = 2 * math.pi / f
            smooth = (self.original_context / wavelength - self.low_freq_factor) / (
                self.high_freq_factor - self.low_freq_factor
            )
            smooth = np.clip(smooth, 0.0, 1.0)
            f = (1 - smooth) * f / self.factor + smooth * f
        return f.astype(np.float32)

    def angles(
        self, positions: Int[Array, "batch length"], head_dim: int
    ) -> tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]:
        """Cosine and sine of `position * frequency`, float32."""
        angle = positions[..., None].astype(jnp.float32) * jnp.asarray(self.frequencies(head_dim))
        return jnp.cos(angle), jnp.sin(angle)
