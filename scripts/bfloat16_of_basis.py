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
import numpy as np
import tyro
from comparison_texts import read_windows
from tyro.conf import Positional

import wisparse_jax as ws
from wisparse_jax.errors import WisparseError


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
        windows = read_windows(args.text, exact, ws.load_tokenizer(args.model), args.window, args.tokens, 1000)
        for where, folded in (("as it is", None), ("in the basis", basis)):
            single, half = (ws.load(args.model, dtype, basis=folded) for dtype in ("float32", "bfloat16"))
            rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), single.params)
            single = ws.Llama.from_params(single.config, rounded)
            for what, model in (("weights alone", single), ("everything", half)):
                kls = divergences(exact, model, windows)
                error = kls.std(ddof=1) / np.sqrt(len(kls))
                print(f"{where}, {what} in bfloat16: {kls.mean():.5f} ± {error:.5f}, {windows.size} tokens", flush=True)
    except WisparseError as error:
        sys.exit(f"bfloat16_of_basis: {error}")


def divergences(one: ws.Llama, other: ws.Llama, windows: np.ndarray) -> np.ndarray:
    """KL of each window, mean over its positions."""
    found = []
    for row in windows:
        p, q = (jax.nn.log_softmax(model(row[None]).astype(jnp.float32)) for model in (one, other))
        found.append(float((jnp.exp(p) * (p - q)).sum(axis=-1).mean()))
    return np.array(found)


if __name__ == "__main__":
    main()
