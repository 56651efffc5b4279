"""An allocator and a stage from a user's file, in one process that has only that file and the package."""

import pytest

from wisparse_jax.errors import ConfigError, WisparseError
from wisparse_jax.search import SearchSettings
from wisparse_jax.search.allocators import ALLOCATORS, allocator, get_allocator
from wisparse_jax.search.methods import resolve

MINE = """
import dataclasses

import jax
import numpy as np

import wisparse_jax as ws
from wisparse_jax.calibration.settings import setting
from wisparse_jax.report.tables import console, timing_table
from wisparse_jax.search import Allocation, Method, Stage, allocator
from wisparse_jax.search.cost import search_tokens
from wisparse_jax.search.methods import parts
from wisparse_jax.search.stages import Part
from wisparse_jax.testing import tiny_model

jax.config.update("jax_disable_most_optimizations", True)


@dataclasses.dataclass(frozen=True)
class Settings(ws.SearchSettings):
    slope: float = setting(0.1, share=True)


@allocator("mine", starts_from="uniform", tokens=lambda settings: 7.0)
def mine(problem):
    depth = np.linspace(-1, 1, problem.blocks) * Settings.of(problem.settings).slope
    row = problem.within_budget(problem.target + depth[None])[0]
    return Allocation(np.repeat(row[:, None], 7, axis=1), {})


@dataclasses.dataclass(frozen=True)
class Swap(Stage):
    rows = ("swap",)

    def parts(self, size):
        return [Part("swap", size.text)]

    def run(self, search, draft):
        with search.stage("swap"):
            swapped = draft.sparsities[::-1]
        return dataclasses.replace(draft, sparsities=swapped).recorded("swap", True)


model = tiny_model()
tokens = jax.random.randint(jax.random.key(1), (4, 48), 0, model.config.vocab_size)
settings = Settings(window=48, tokens=192, held_out_share=0.25, compare_teal=False, slope=0.2)
named = dataclasses.replace(settings, allocator="mine")
by_name = ws.calibrate(model, tokens, 0.5, "uniform", settings=named)
assert "budgets 0.5, held-out KL" in by_name.history
method = Method("swapped", "mine, turned round", (*parts(allocator=mine), Swap()))
swapped = ws.calibrate(model, tokens, 0.5, method, settings=dataclasses.replace(settings, held_out_share=0.0))
np.testing.assert_allclose(swapped.sparsities[:, 0], [0.7, 0.5, 0.3])
assert swapped.method == "swapped" and swapped.history["swap"] is True and "swap" in swapped.timings
found = search_tokens(model.config, method, settings)
assert (found["swap"], found["budgets"]) == (192, 7)
console().print(timing_table({"swapped": swapped.timings}))
off = dataclasses.replace(settings, basis="none", gains="norms", biases="off", held_out_share=0.0)
alone = ws.calibrate(model, tokens, 0.5, lambda problem: mine(problem), settings=off)
np.testing.assert_allclose(alone.sparsities[:, 0], [0.3, 0.5, 0.7])
print("done")
"""


def test_an_allocator_and_a_stage_come_from_a_users_file(run_python):
    done = run_python(MINE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "done"
    assert sum(line.startswith("│ swap ") for line in done.stdout.splitlines()) == 1  # a row of the time table


def test_a_name_is_taken_once(monkeypatch):
    with pytest.raises(WisparseError, match="allocator = 'greedy': is the name of wisparse_jax"):
        allocator("greedy")(lambda problem: None)  # pyright: ignore[reportArgumentType]
    again = ALLOCATORS["greedy"]
    monkeypatch.setitem(ALLOCATORS, "greedy", again)
    allocator("greedy", asks=("paths",))(again.function)  # a notebook's cell that is run again
    assert get_allocator("greedy") == again and get_allocator(again.function) is get_allocator("greedy")


def test_a_switch_that_no_stage_knows_is_refused():
    from wisparse_jax.search import Method

    bare = Method("bare", "nothing but thresholds", ())
    assert resolve(bare, SearchSettings()) == bare
    with pytest.raises(WisparseError, match="basis = 'eigen': expected method, as bare has no stage that it switches"):
        resolve(bare, SearchSettings(basis="eigen"))
    with pytest.raises(ConfigError, match="allocator = 'ramp': expected one of method, uniform, greedy"):
        SearchSettings(allocator="ramp")
