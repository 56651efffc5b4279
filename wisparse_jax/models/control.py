"""Keeping the share that is skipped at the one that was asked for, whatever the text.

A plan's thresholds skip its target on the text that they were set on, and up to seven points less or more on another.
In the token loop one factor multiplies all of a sequence's thresholds. Its logarithm is

    GAIN * owed + drift,    owed += target - skipped,    drift += DRIFT * owed

after every token, `skipped` being the share that the token skipped: what was skipped too little is made up for, and
what a text needs for long goes over into the drift. With the 0.4 points that a per cent of the factor brings around a
target of a half, the two are critically damped and settle in about 50 tokens, the memory being a few times that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from wisparse_jax.models.mesh import spread

GAIN, DRIFT = 0.1, 0.001
LEAST, MOST = 0.7, 1.6  # factors
_LOW, _HIGH = math.log(LEAST), math.log(MOST)


class Control(NamedTuple):
    """The factor of each sequence, and what it is made of; a sequence's depends on no other one."""

    target: Float[Array, ""]  # the share to skip
    held: Bool[Array, ""]  # whether it is held; otherwise all factors stay 1, and what is skipped is only counted
    factors: Float[Array, " batch"]
    owed: Float[Array, " batch"]  # shares of a token
    drift: Float[Array, " batch"]
    skipped: Float[Array, " batch"]  # the sum over the tokens so far
    tokens: Int[Array, " batch"]

    @staticmethod
    def start(target: float, held: bool, batch: int, mesh: Mesh | None = None) -> Control:
        """All factors 1, nothing owed."""
        zeros = np.zeros(batch, np.float32)
        rows = (zeros + 1, zeros, zeros, zeros, np.zeros(batch, np.int32))
        return Control(jnp.float32(target), jnp.bool_(held), *(spread(mesh, row) for row in rows))

    def after(self, skipped: Float[Array, " batch"], running: Bool[Array, " batch"]) -> Control:
        """What holds for the next token, of which share each sequence skipped for this one and which still run."""
        owed = self.owed + (self.target - skipped)
        drift = jnp.clip(self.drift + DRIFT * owed, _LOW, _HIGH)
        # What no factor within the ends makes up for is forgotten, so that the way back from an end is short.
        owed = jnp.clip(owed, (_LOW - drift) / GAIN, (_HIGH - drift) / GAIN)
        factors = jnp.where(self.held, jnp.exp(GAIN * owed + drift), 1.0)
        counted = jnp.where(running, skipped, 0.0)
        return Control(
            self.target,
            self.held,
            factors,
            owed,
            drift,
            self.skipped + counted,
            self.tokens + running.astype(jnp.int32),
        )
