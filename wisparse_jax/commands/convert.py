"""`wisparse convert`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

if TYPE_CHECKING:
    from wisparse_jax.sparsity import SparsityPlan


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
    plan: str | None = None
    """A plan, a folder or a hub id: the weights are folded into its basis before they are rounded, and whatever loads
    OUT runs the plan."""
    dtype: str | None = None
    """float32 or bfloat16 for weights that are not rounded to integers; by default each tensor's own."""

    def run(self) -> None:
        """Convert."""
        from wisparse_jax.models.checkpoint import convert
        from wisparse_jax.sparsity import SparsityPlan, convert_with_plan

        how = (self.weights, self.head, self.dtype)
        if self.plan is None:
            convert(self.model, self.out, *how)
        else:
            plan = SparsityPlan.load(self.plan)
            convert_with_plan(self.model, self.out, plan, *how)
            _say(plan, self.out)
        print(self.out)


def _say(plan: SparsityPlan, out: Path) -> None:
    """What a plan made of the model."""
    from wisparse_jax.models.config import read_config

    basis = "with"
    if plan.basis is not None:
        config = read_config(out)
        basis = "folded into the basis of"
        if config.tied_embeddings:
            weights = config.vocab_size * config.hidden_size
            print(
                f"tied embeddings became two matrices: {weights:,} weights more to keep, none to read", file=sys.stderr
            )
    print(f"{basis} the {plan.method} plan, sparsity {plan.target:g}, which is used by default", file=sys.stderr)
