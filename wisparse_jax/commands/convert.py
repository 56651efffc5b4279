"""`wisparse convert`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import Positional


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a model as an Orbax checkpoint that every command accepts."""

    model: Positional[str]
    """A folder, a hub id, `demo`, or a GGUF file of a Llama, Mistral, Qwen2 or Qwen3 model."""
    out: Positional[Path]
    """Folder to write; it must not exist."""
    weights: str | None = None
    """int8 or int4 rounds the block weights, so that nothing is rounded when the model is loaded."""
    head: str | None = None
    """int8 rounds the head."""

    def run(self) -> None:
        """Convert."""
        from wisparse_jax.models.checkpoint import convert

        convert(self.model, self.out, self.weights, self.head)
        print(self.out)
