"""What a search will cost: the arithmetic of docs/method.md."""

import numpy as np
import pytest

from wisparse_jax.models.config import read_config
from wisparse_jax.presets import settings_file
from wisparse_jax.search import METHODS, SearchSettings, read_settings
from wisparse_jax.search.allocators import ALLOCATORS
from wisparse_jax.search.cost import Speed, duration, forecast, search_tokens, seconds_per_token, training_seconds
from wisparse_jax.search.forecast import KINDS, Part
from wisparse_jax.search.problem import Allocation
from wisparse_jax.search.stages import STAGES


@pytest.fixture(scope="module")
def config(repository):
    return read_config(repository / "configs" / "llama-3.1-8b.json")


def test_the_parts_are_those_of_the_documentation(config):
    plus = search_tokens(config, METHODS["wisparse-plus"], SearchSettings())
    assert plus["gains"] == plus["budgets"] == 3 * 16_384 and plus["moments"] == 16_384 + 3 * 16_384
    assert plus["training"] == 3 * 2_048 * 300 + 300 / 25 * 4 * 512  # of 32 windows four are held out
    paths = search_tokens(config, METHODS["teal"], SearchSettings())["budgets"]
    assert paths / (7 * 2_048) == pytest.approx(190, abs=10)  # steps
    assert search_tokens(config, METHODS["wisparse"], SearchSettings())["budgets"] == paths + 32 * 61 * 4_096
    assert search_tokens(config, METHODS["wisparse-paper"], SearchSettings())["budgets"] == paths + 64 * 400 * 4_096


def test_a_step_of_the_basis_multiplies_samples_and_gradients(config):
    plain = SearchSettings(absolute_steps=1, skipped_steps=0, heads_steps=0)
    skipping = SearchSettings(absolute_steps=0, skipped_steps=1, heads_steps=0)
    heads = SearchSettings(absolute_steps=0, skipped_steps=0, heads_steps=10)
    one, other = (search_tokens(config, METHODS["wisparse-plus"], settings)["basis"] for settings in (plain, skipping))
    weights = 8_030_261_248 - 128_256 * 4096 - 65 * 4096  # without the embedding and the norms
    assert one == pytest.approx((3 * 16 * 512 * 4096**2 + 8 * 4096**3) / weights)
    assert other - one == pytest.approx(3 * 16 * 4096**3 / weights)
    assert search_tokens(config, METHODS["wisparse-plus"], heads)["basis"] == pytest.approx(7 * other)


def test_teals_row_is_counted_where_it_is_searched_for_alone(config):
    on, off = SearchSettings(), SearchSettings(compare_teal=False)
    paths = search_tokens(config, METHODS["teal"], on)["budgets"]
    for name, alone in (("uniform", True), ("wisparse-plus", True), ("teal", False)):
        with_teal, without = (search_tokens(config, METHODS[name], settings)["comparison"] for settings in (on, off))
        judged = 4 * 512  # tokens of the windows held out: the row itself is one run over them
        assert with_teal - without == judged + alone * paths, name


def test_every_stage_of_a_search_is_counted(config):
    size = {name: search_tokens(config, name, SearchSettings()) for name in METHODS}
    rows = {row for kind in STAGES for row in kind.rows}
    assert all(set(found) <= rows for found in size.values())
    assert set.union(*(set(found) for found in size.values())) == rows
    held = {name for name in rows if all(name in found for found in size.values())}
    assert held == {"statistics", "budgets", "thresholds", "held out", "comparison"}
    assert all(
        value > 0 for found in size.values() for name, value in found.items() if name not in ("held out", "budgets")
    )


def test_the_time_of_a_token_is_measured(tiny_model):
    assert 0 < seconds_per_token(tiny_model) < 1 and np.isfinite(seconds_per_token(tiny_model))


def test_training_is_timed_by_a_step_of_a_block(tiny_model):
    forward = 1e-5
    alone = training_seconds(tiny_model, 0.0)
    config = tiny_model.config
    share = config.vocab_size * config.hidden_size
    share /= share + config.num_blocks * sum(config.layer_weights)
    assert 0 < alone < 1 and 0 < share < 1
    parts = [Part("training", 10.0, kind="training"), Part("statistics", 5.0), Part("gains", 4.0, kind="gradients")]
    assert Speed(forward, 3 * forward).seconds(parts) == pytest.approx((35 + 4 * KINDS["gradients"]) * forward)


def test_targets_share_what_does_not_depend_on_them(config):
    one, three = (search_tokens(config, METHODS["wisparse-plus"], SearchSettings(), n) for n in (1, 3))
    own = {"training", "thresholds"}
    assert {name for name in one if three[name] == 3 * one[name]} == own
    assert {name for name in one if three[name] != one[name]} == own | {"held out", "comparison"}
    once, thrice = (search_tokens(config, METHODS["teal"], SearchSettings(), n)["budgets"] for n in (1, 3))
    assert once == thrice  # the paths serve every target


@pytest.mark.parametrize(
    ("forward", "training", "said"),
    [
        (1e-5, 1e-5, None),  # below half a minute by the dense model alone: training is not timed
        (2e-4, 2e-4, None),  # below a minute
        (1e-3, 1e-2, "about 7 minutes on this device, compiling aside (180 thousand tokens forwarded)"),
        (1e-2, 1e-2, "about 40 minutes on this device, compiling aside (180 thousand tokens forwarded)"),
    ],
)
def test_what_takes_long_is_said(demo, monkeypatch, forward, training, said):
    timed = []
    monkeypatch.setattr("wisparse_jax.search.cost.seconds_per_token", lambda _: forward)
    monkeypatch.setattr("wisparse_jax.search.cost.training_seconds", lambda *_: timed.append(1) or training)
    settings = read_settings(settings_file("quick"))
    assert forecast(demo, [METHODS["wisparse-plus"]], settings) == said
    assert bool(timed) == (forward > 1e-5)
    # Too little to do for a measurement, unless the model is large.
    monkeypatch.setattr("wisparse_jax.search.cost.seconds_per_token", lambda _: 1.0)
    assert forecast(demo, [METHODS["uniform"]], settings) is None
    monkeypatch.setattr("wisparse_jax.search.cost.weights_a_token", lambda _: 10**9)
    assert (forecast(demo, [METHODS["uniform"]], settings) or "").startswith("about ")


def test_text_that_is_sampled_and_plans_that_are_measured_count(demo, monkeypatch):
    monkeypatch.setattr("wisparse_jax.search.cost.seconds_per_token", lambda _: 0.001)
    settings = read_settings(settings_file("quick"))
    teal = [METHODS["teal"]]
    alone, twice = forecast(demo, teal, settings), forecast(demo, teal * 2, settings)
    more = forecast(demo, teal, settings, sampled=120_000, read=120_000)
    assert alone is not None and alone.startswith("about 9 minutes") and "270 thousand" in alone
    assert twice is not None and twice.startswith("about 15 minutes") and "550 thousand" in twice
    assert more is not None and more.startswith("about 20 minutes") and "390 thousand" in more  # 12 minutes more


def test_a_time_is_no_more_exact_than_an_estimate():
    said = [
        duration(seconds) for seconds in (7.6, 42.0, 119.0, 130.0, 560.0, 1100.0, 7300.0, 26 * 3600.0, 3 * 86_400.0)
    ]
    assert said == ["8 seconds", "40 seconds", "120 seconds", "2 minutes", "9 minutes", "20 minutes", "2 hours",
                    "25 hours", "3 days"]  # fmt: skip


def test_every_allocator_has_a_price_and_a_new_one_may_lack_it(config):
    prices = {name: search_tokens(config, "uniform", SearchSettings(allocator=name))["budgets"] for name in ALLOCATORS}
    assert {name for name, price in prices.items() if price == 0} == {"uniform"}
    assert search_tokens(config, lambda problem: Allocation(problem.uniform(), {}), SearchSettings())["budgets"] == 0
    assert prices["evolution"] - prices["greedy"] == 32 * 61 * 4_096
