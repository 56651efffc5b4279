"""`wisparse convert`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from wisparse_jax.commands.options import Unset
from wisparse_jax.errors import WisparseError

if TYPE_CHECKING:
    from jaxtyping import Int32
    from numpy import ndarray

    from wisparse_jax.sparsity import SparsityPlan


LONGEST_WINDOW = 2048  # of the text to round by, tokens


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a model as an Orbax checkpoint that every command accepts."""

    model: Positional[str]
    """A folder, a hub id, `demo`, or a GGUF file of a Llama, Mistral, Qwen2 or Qwen3 model."""
    out: Positional[Path]
    """Folder to write; it must not exist."""
    weights: Unset[str | None] = None
    """The format to round the block weights to, such as int8, so that nothing is rounded when the model is loaded."""
    head: Unset[str | None] = None
    """int8 rounds the head."""
    plan: Unset[str | None] = None
    """A plan, a folder or a hub id: the weights are folded into its basis before they are rounded, and whatever loads
    OUT runs the plan."""
    dtype: Unset[str | None] = None
    """float32 or bfloat16 for weights that are not rounded to integers; by default each tensor's own."""
    rounding: Literal["nearest", "compensated"] = "nearest"
    """How int4 weights are rounded: each to the nearest, or, better and slower, so that the layers' outputs on a text
    change least."""
    text: Unset[str | None] = None
    """The text for compensated rounding: a UTF-8 file, or `self` for text that the model samples."""
    tokens: int = 32768
    """Tokens of that text, rounded up to whole windows of at most 2,048; several for each channel of a layer."""
    seed: int = 0
    """Seed of sampled text."""

    def run(self) -> None:
        """Convert the model and write its checkpoint, whole or not at all."""
        from wisparse_jax.files import check_new_folder
        from wisparse_jax.models.checkpoint import check_stored_dtype
        from wisparse_jax.models.loading import check_kinds
        from wisparse_jax.sparsity import SparsityPlan, convert

        check_new_folder(self.out, WisparseError)
        check_kinds(weights=self.weights, head=self.head)
        check_stored_dtype(self.dtype)
        plan = None if self.plan is None else SparsityPlan.load(self.plan)
        convert(self.model, self.out, self.weights, self.head, self.dtype, self._windows(), plan=plan)
        if plan is not None:
            _say(plan, self.out)
        print(self.out)

    def _windows(self) -> Int32[ndarray, "windows length"] | None:
        """The text to round by."""
        from wisparse_jax.arguments import check_count, check_seed
        from wisparse_jax.commands.texts import SELF, file_windows, sampled_windows
        from wisparse_jax.models.formats import BY_TEXT, one_of
        from wisparse_jax.models.gguf import SUFFIX
        from wisparse_jax.models.loading import load

        check_count(self.tokens, "tokens", least=1)
        check_seed(self.seed)
        if self.rounding == "nearest":
            if self.text is not None:
                raise WisparseError("text: expected with --rounding compensated only")
            return None
        if self.weights not in BY_TEXT:
            raise WisparseError(f"rounding = 'compensated': expected --weights {one_of(BY_TEXT)}, found {self.weights}")
        if self.text is None:
            raise WisparseError("rounding = 'compensated': expected --text FILE, or --text self")
        if Path(self.model).suffix == SUFFIX:
            raise WisparseError(f"{self.model}: a GGUF file is converted first, and what comes of it is then rounded")
        if self.text == SELF:
            return sampled_windows(load(self.model), self.model, LONGEST_WINDOW, self.tokens, self.seed)[0]
        return file_windows(self.model, self.text, LONGEST_WINDOW, self.tokens)


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
