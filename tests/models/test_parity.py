"""Numerical parity with transformers; `python tests/models/test_parity.py` prints the measured errors.

The references are made by scripts/make_parity_fixtures.py, which also says what each file holds.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from safetensors.numpy import load_file

from wisparse_jax.models import forward
from wisparse_jax.models.loading import load
from wisparse_jax.models.model import Model

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"
VARIANTS = sorted(folder.name for folder in FIXTURES.iterdir())
WORST = 3.7e-6  # of the table in docs/parity.md; another jax may round differently, but not ten times worse
LIMIT, APART = 10 * WORST, 1e-3  # of the largest logit


def error(found: Any, wanted: np.ndarray) -> float:
    """The largest difference, relative to the largest logit."""
    return float(np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max())


def real(logits: Any, start: np.ndarray) -> np.ndarray:
    """The logits at positions that are not padding, one after the other."""
    return np.concatenate([np.asarray(logits)[row, begin:] for row, begin in enumerate(start)])


def cached_logits(model: Model, tokens: np.ndarray, start: np.ndarray, prefill: int) -> np.ndarray:
    """Logits of whole sequences, the first `prefill` positions at once, the rest one by one from the cache."""
    config, (batch, length), begin = model.config, tokens.shape, jnp.asarray(start)

    @jax.jit
    def run(params: Any, tokens: jax.Array) -> jax.Array:
        cache = forward.empty_cache(config, batch, length, model.dtype)
        where = forward.layout(config, batch, prefill, start=begin)
        hidden, cache = forward.hidden_states(config, params, tokens[:, :prefill], where, cache)

        def step(cache: Any, t: jax.Array) -> tuple[Any, jax.Array]:
            token = lax.dynamic_slice_in_dim(tokens, t, 1, axis=1)
            where = forward.layout(config, batch, 1, t, begin)
            hidden, cache = forward.hidden_states(config, params, token, where, cache)
            return cache, hidden[:, 0]

        _, rest = lax.scan(step, cache, jnp.arange(prefill, length))
        return forward.head(params, jnp.concatenate([hidden, jnp.swapaxes(rest, 0, 1)], axis=1))

    return np.asarray(run(model.params, jnp.asarray(tokens)))


def measure(folder: Path) -> dict[str, float]:
    """Errors relative to the largest logit; greedy: how many of the 64 tokens agree, from the first on.

    Each figure is the worse of two paths: whole sequences at once, and prefill and decode with a cache.
    """
    model = load(folder, dtype="float32")
    ref = load_file(folder / "reference.safetensors")
    kept, prompt = ref["long_logits"].shape[1], ref["prompt"].shape[1]
    short = np.concatenate([ref["tokens"], ref["padded_tokens"]])
    start = np.concatenate([np.zeros_like(ref["start"]), ref["start"]])
    # The argmax after every right prefix is right: by induction, so is the sequence decoded from the prompt.
    decoded = np.concatenate([ref["prompt"][0], ref["greedy"]])
    long_ = np.stack([ref["long_tokens"][0], np.pad(decoded, (0, ref["long_tokens"].shape[1] - len(decoded)))])
    none = np.zeros(2, np.int32)

    worst = {"plain": 0.0, "padded": 0.0, "long": 0.0, "greedy": 64.0}
    for a, b in (
        (model(jnp.asarray(short), jnp.asarray(start)), model(jnp.asarray(long_))),
        (cached_logits(model, short, start, 10), cached_logits(model, long_, none, 24)),
    ):
        a, b = np.asarray(a), np.asarray(b)
        same = b[1, prompt - 1 : prompt + 63].argmax(-1) == ref["greedy"]
        errors = {
            "plain": error(a[:2], ref["logits"]),
            "padded": error(real(a[2:], ref["start"]), real(ref["padded_logits"], ref["start"])),
            "long": error(b[:1, -kept:], ref["long_logits"]),
        }
        worst = {k: max(worst[k], errors[k]) for k in errors} | {
            "greedy": min(worst["greedy"], float([*same, False].index(False)))
        }
    return worst


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(variant: str) -> None:
    found = measure(FIXTURES / variant)
    assert found.pop("greedy") == 64
    assert max(found.values()) < LIMIT, found


def test_the_limit_is_that_of_the_published_table(repository: Path) -> None:
    page = (repository / "docs/parity.md").read_text()
    rows = re.findall(r"^\| [^|]+" + r"\| (\d\.\de-\d) " * 3 + r"\|$", page, re.M)
    assert len(rows) == len(VARIANTS) and max(float(number) for row in rows for number in row) == WORST


def test_every_variant_is_there() -> None:
    families = {"llama2", "llama3", "llama3.1", "llama3.2", "llama-linear-rope", "llama-biases", "llama-head-dim"}
    families |= {"mistral", "mistral-window", "qwen2", "qwen2-window", "qwen2.5", "qwen3", "smollm2"}
    assert set(VARIANTS) == families


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("llama3.1", {"rope": {"kind": "default"}}),
        ("llama3.2", {"rope": {"factor": 8.0}}),
        ("llama-linear-rope", {"rope": {"factor": 2.0}}),
        ("llama3", {"rope": {"theta": 10000.0}}),
        ("mistral", {"windows": (None, None)}),
        ("mistral", {"windows": (17, 17)}),
        ("mistral-window", {"windows": (16, 16)}),
        ("qwen2-window", {"windows": (16, 16)}),
        ("qwen2-window", {"windows": (None, None)}),
    ],
)
def test_references_tell_the_variants_apart(variant: str, change: dict[str, Any]) -> None:
    model = load(FIXTURES / variant, dtype="float32")
    ref = load_file(FIXTURES / variant / "reference.safetensors")
    if "rope" in change:
        change = {"rope": dataclasses.replace(model.config.rope, **change["rope"])}
    other = Model(dataclasses.replace(model.config, **change), model.params)
    found = other(jnp.asarray(ref["long_tokens"]))
    assert error(found[:, -ref["long_logits"].shape[1] :], ref["long_logits"]) > APART


def main() -> None:
    print("| variant | plain batch | left-padded batch | past the boundary or window | greedy tokens |")
    print("|---|---|---|---|---|")
    for variant in VARIANTS:
        found = measure(FIXTURES / variant)
        errors = " | ".join(f"{found[name]:.1e}" for name in ("plain", "padded", "long"))
        print(f"| {variant} | {errors} | {found['greedy']:.0f}/64 |")


if __name__ == "__main__":
    main()
