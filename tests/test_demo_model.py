"""The packaged demo model: its size, its files, and that it was really trained."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wisparse_jax.models.loading import load, load_tokenizer

FOLDER = Path(str(resources.files("wisparse_jax") / "demo_model"))

# Written for this test; no part of any training text.
PASSAGE = """The ferry left the small harbour a little before seven, while the lamps along the quay were still burning.
There were only five of us on deck: two farmers who were taking a crate of hens to the market, a schoolmaster with a
heavy bag of books, an old woman in a grey shawl, and myself. Nobody spoke for some time. The water was quite still,
and the hills on the far side of the bay stood up so clearly that one could count the trees upon them.

"It will rain before noon," said the old woman at last, and she drew the shawl closer about her shoulders.

The schoolmaster looked at the sky, in which there was not a single cloud, and smiled politely. "Why do you think so,
madam?" he asked.

"Because my brother has gone out without his coat," she answered. "He has done so eleven times this year, and every
time he has come home wet to the skin."

At this the farmers laughed, and after that we were all on better terms. One of them showed me the hens, and told me
what he hoped to get for each; the other pointed out the white house where he had been born, and the field that he had
sold to pay his father's debts. By the time we reached the town it was raining hard.
"""


@pytest.fixture(scope="module")
def model():
    return load("demo", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


def test_it_is_small(model):
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert 6_000_000 <= parameters <= 8_000_000
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 17_000_000


def test_its_files_agree(model, tokenizer):
    raw = json.loads((FOLDER / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForCausalLM"]
    assert raw["dtype"] == "bfloat16"
    assert model.config.context == raw["max_position_embeddings"] >= 512
    assert model.config.vocab_size == tokenizer.vocab_size == 4096
    assert (tokenizer.inner.bos_token_id,) == model.config.bos_token_ids
    assert (tokenizer.inner.eos_token_id,) == model.config.eos_token_ids
    assert (FOLDER / "README.md").is_file()


def test_its_weights_are_bfloat16():
    assert load("demo", dtype="bfloat16").dtype == jnp.bfloat16
    wide, narrow = load("demo", dtype="float32").params, load("demo", dtype="bfloat16").params
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b.astype(jnp.float32))), wide, narrow)
    assert all(jax.tree.leaves(same))


def test_it_predicts_plain_prose(model, tokenizer):
    """Measured 1.28 bits a byte; an untrained model needs 12 bits a token, 3.4 a byte here."""
    ids = np.array(tokenizer.encode(PASSAGE), np.int32)
    assert len(PASSAGE.encode()) >= 1000 and len(ids) <= model.config.context
    log_probs = jax.nn.log_softmax(model(ids[None, :-1])[0])
    nats = -float(jnp.take_along_axis(log_probs, ids[1:, None], axis=-1).sum())
    assert nats / math.log(2) / len(PASSAGE.encode()) < 1.45


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n\t x",
        "plain words.",
        "ångström naïve Œuvre",
        "日本語 и кириллица",
        "👩\u200d🚀🏳️\u200d🌈",
        "\x00\x7f",
        "e\u0301 \ufeff\u202e",
    ],
)
def test_its_tokenizer_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.inner.bos_token_id
    assert tokenizer.encode(text, bos=False) == ids[1:]
    assert tokenizer.decode(ids) == text
