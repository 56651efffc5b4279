"""What bfloat16 costs a model as it is, and folded into the basis of a plan: KL to the float32 model, nats per token.

    python scripts/bfloat16_of_basis.py MODEL PLAN --text wikitext=wikitext2-test.txt@300000:

First with the weights alone rounded and float32 arithmetic, then with everything in bfloat16. All layers dense.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from comparison_texts import read_windows
from tyro.conf import Positional

import wisparse_jax as ws
from wisparse_jax.errors import WisparseError
from wisparse_jax.report.comparison import EVALUATION_SEED


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure what bfloat16 costs."""

    model: Positional[str]
    plan: Positional[Path]
    text: str = "self"
    tokens: int = 8_192
    window: int = 512


def main() -> None:
    """Print a line for each of the four."""
    args = tyro.cli(Arguments, description=__doc__)
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        basis = ws.SparsityPlan.load(args.plan).basis
        if basis is None:
            raise WisparseError(f"{args.plan}: expected a plan with a basis")
        exact = ws.load(args.model, "float32")
        tokenizer = ws.load_tokenizer(args.model)
        windows = read_windows(args.text, exact, tokenizer, args.window, args.tokens, EVALUATION_SEED)
        models = {}
        for where, folded in (("as it is", None), ("in the basis", basis)):
            single = exact if folded is None else ws.load(args.model, "float32", basis=folded)
            rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), single.params)
            models[f"{where}, weights alone in bfloat16"] = ws.Llama.from_params(single.config, rounded)
            models[f"{where}, everything in bfloat16"] = ws.load(args.model, "bfloat16", basis=folded)
        result = ws.evaluate(exact, windows, models, sparse_prefill=1.0)
        for name, score in result.sparse.items():
            print(f"{name}: {score.divergence:.5f}, {result.tokens} tokens")
    except WisparseError as error:
        sys.exit(f"bfloat16_of_basis: {error}")


if __name__ == "__main__":
    main()
