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
_ORIGINAL = "original_max_position_embeddings"
# Two spellings of the kind, and what only 1.0 is accepted for.
_NAMES = ("rope_type", "type", "partial_rotary_factor")


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
        """Read the rotary settings of a `config.json` as transformers 5 standardises them.

        `rope_scaling`, where it is given, stands in place of `rope_parameters`; a top-level `rope_theta` fills in a
        missing one, and a top-level `original_max_position_embeddings` comes before any other. What would have no
        effect is refused.

        Raises:
            ConfigError: a setting that is missing, malformed, not built or not applied; names the field.
        """
        field, given = _settings(raw)
        kind = given.get("rope_type", given.get("type", "default"))
        if given.get("type", kind) != kind:
            raise ConfigError(f"{field}: rope_type = {kind!r} and type = {given['type']!r} contradict each other")
        if not isinstance(kind, str) or kind not in _NEEDED:
            raise ConfigError(f"{field}.rope_type = {kind!r} is not supported; expected one of {', '.join(_NEEDED)}")
        factor = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
        if factor not in (None, 1.0):
            raise ConfigError(f"{field}.partial_rotary_factor = {factor!r}: only 1.0 is supported")
        applied = dict(given)
        applied.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
        if kind == "llama3":
            applied.setdefault("original_max_position_embeddings", context)
            if raw.get(_ORIGINAL) is not None:
                applied[_ORIGINAL] = raw[_ORIGINAL]
        known = {"rope_theta", *_NEEDED[kind]}
        _refuse_what_is_not_applied(raw, field, kind, {name: applied.get(name) for name in known})
        for name in _NEEDED[kind]:
            value = applied.get(name)
            whole = isinstance(value, int) or name != _ORIGINAL
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf or not whole:
                wanted = "number" if name != _ORIGINAL else "whole number"
                raise ConfigError(f"{field}.{name}: expected a positive {wanted}, found {value!r}")
        theta = applied["rope_theta"]
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < math.inf:
            raise ConfigError(f"rope_theta: expected a number above 1, found {theta!r}")
        if kind == "default":
            return Rope(float(theta))
        if kind == "linear":
            return Rope(float(theta), kind, float(applied["factor"]))
        low, high = float(applied["low_freq_factor"]), float(applied["high_freq_factor"])
        if low >= high:
            raise ConfigError(f"{field}.low_freq_factor = {low} must be below high_freq_factor = {high}")
        return Rope(float(theta), kind, float(applied["factor"]), low, high, applied[_ORIGINAL])

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
        angle = positions[..., None].astype(jnp.float32) * self.frequencies(head_dim)[None, None]
        return jnp.cos(angle), jnp.sin(angle)


def _settings(raw: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The object that transformers takes the settings from, and its field."""
    objects = {}
    for field in ("rope_scaling", "rope_parameters"):
        value = raw.get(field)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{field}: expected an object, found {value!r}")
        objects[field] = {} if value is None else value
    field = "rope_scaling" if objects["rope_scaling"] else "rope_parameters"
    return field, objects[field]


def _refuse_what_is_not_applied(raw: dict[str, Any], field: str, kind: str, applied: dict[str, Any]) -> None:
    """Refuse every setting of the file that is neither applied nor empty; `applied` holds what is."""
    for where in ("rope_scaling", "rope_parameters"):
        for name, value in (raw.get(where) or {}).items():
            if name in _NAMES and (where == field or value in (kind, "default", None, 1.0)):
                continue
            if value is not None and (name not in applied or applied[name] != value):
                beside = f"with rope_type = {kind!r}" if where == field else f"beside {field}"
                raise ConfigError(f"{where}.{name} = {value!r} would not be applied {beside}")
    for name, value in raw.items():
        if name in ("rope_scaling", "rope_parameters", "partial_rotary_factor"):
            continue
        if not ("rope" in name or "rotary" in name or name == _ORIGINAL) or value in (None, False, [], {}):
            continue
        if name not in applied or applied[name] != value:
            raise ConfigError(f"{name} = {value!r} would not be applied with {field}.rope_type = {kind!r}")
