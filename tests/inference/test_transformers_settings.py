"""Settings by transformers' names; the values beside them are what transformers 5.24 does with them."""

import json

import pytest

from wisparse_jax.errors import ConfigError, WisparseError
from wisparse_jax.inference import Sample
from wisparse_jax.inference.transformers_settings import read_generation_settings, sampler_of


@pytest.mark.parametrize(
    ("asked", "model", "expected"),
    [
        ({}, {}, Sample(0.0)),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.5}, {}, Sample(0.0)),
        ({"do_sample": True, "temperature": 0.7}, {}, Sample(0.7, 50)),  # transformers keeps 50 unless told
        ({"do_sample": True, "temperature": 1, "top_k": 0}, {}, Sample(1.0)),
        ({"do_sample": True, "temperature": 1.0, "top_k": None}, {}, Sample(1.0, 50)),
        ({"do_sample": True, "temperature": 1.0, "top_p": 0}, {}, Sample(1.0, 1)),  # the most likely alone
        ({"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 5}, {}, Sample(1.0, 5, 0.9)),
        ({"do_sample": True, "temperature": 1.0, "min_p": 0.1}, {}, Sample(1.0, 50, min_p=0.1)),
        ({"repetition_penalty": 1.2}, {}, Sample(0.0, repetition_penalty=1.2)),
        ({"num_beams": 1, "no_repeat_ngram_size": 0, "bad_words_ids": None, "use_cache": True}, {}, Sample(0.0)),
        ({"suppress_tokens": [], "typical_p": 1.0, "length_penalty": 1}, {}, Sample(0.0)),
        ({}, {"repetition_penalty": 1.1, "temperature": 0.6}, Sample(0.0, repetition_penalty=1.1)),
        ({"do_sample": True, "temperature": 1.0}, {"top_k": 20, "top_p": 0.8}, Sample(1.0, 20, 0.8)),
        ({"repetition_penalty": 1.0}, {"repetition_penalty": 1.1}, Sample(0.0)),
        ({"typical_p": 0.9}, {"epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4}, Sample(0.0)),  # of samples alone
        ({"no_repeat_ngram_size": 0}, {"no_repeat_ngram_size": 3}, Sample(0.0)),
    ],
)
def test_settings_are_transformers(asked, model, expected):
    assert sampler_of(asked, model) == expected


@pytest.mark.parametrize(
    ("asked", "refusal"),
    [
        ({"num_beams": 4}, "num_beams = 4: not done here: expected 1, or nothing"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size = 3: not done here: expected 0, or nothing"),
        ({"bad_words_ids": [[5]]}, r"bad_words_ids = \[\[5\]\]: not done here: expected nothing"),
        ({"num_return_sequences": 2}, "num_return_sequences = 2: not done here"),
        ({"do_sample": True, "temperature": 1.0, "typical_p": 0.9}, "typical_p = 0.9: not done here"),
        (
            {"stop": ["x"]},
            "stop = .*: not known: expected some of temperature, top_k, top_p, min_p, repetition_penalty",
        ),
        ({"do_sample": True, "temperature": 0.0}, "do_sample = True: expected a temperature above 0"),
        ({"do_sample": 1}, "do_sample = 1: expected true or false"),
        ({"do_sample": True, "top_k": -1}, "top-k = -1: expected 1 or above"),
        ({"do_sample": True, "min_p": 1.5}, "min-p = 1.5: expected a share"),
        ({"do_sample": True, "top_p": 1.5}, "top-p = 1.5: expected a share"),
        ({"repetition_penalty": 0}, "repetition-penalty = 0.0: expected a number from 0.001 to 1000"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(asked, refusal):
    with pytest.raises(WisparseError, match=refusal):
        sampler_of(asked)


def test_a_models_own_settings_are_those_of_its_generation_config(tmp_path):
    assert read_generation_settings(tmp_path) == {}
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2], "top_k": 20, "min_p": None, "length_penalty": 2.0}))
    assert read_generation_settings(tmp_path) == {"top_k": 20}
    path.write_text(json.dumps({"no_repeat_ngram_size": 3}))
    with pytest.raises(WisparseError, match=r"generation_config.json: no_repeat_ngram_size = 3: not done here"):
        sampler_of({}, read_generation_settings(tmp_path))
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config.json: not readable as JSON"):
        read_generation_settings(tmp_path)
