"""A search that is killed anywhere goes on to the same plan, and computes nothing twice."""

import dataclasses
import gc
import json
import os
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from wisparse_jax.errors import WisparseError
from wisparse_jax.interruption import goes_on_from, last_words
from wisparse_jax.search import SearchSettings, calibrate, problem
from wisparse_jax.search.losses import KLLoss
from wisparse_jax.search.stages import Comparison, basis, exponents, score, training
from wisparse_jax.search.state import Place, SearchState, identity_of, remove_state

# Every stage that a method may have, in one search.
ALL = SearchSettings(
    held_out_share=0.25,
    basis="eigen",
    gains="trained",
    biases="on",
    statistics_tokens=64,
    gradient_tokens=64,
    training_steps=2,
    training_every=1,
    exponent_step=0.5,
    exponent_passes=1,
    population=4,
    generations=11,
    layer_step=0.3,
    block_tokens=24,
    layer_tokens=24,
    exponent_tokens=24,
    compare_teal=False,
)
STAGES = {
    "moments": (basis, "measure_moments", 1),
    "gains": (score, "gradient_gains", 1),
    "exponents": (exponents, "search_exponents", 2),
    "paths": (problem, "greedy_path", 2),
    "populations": (KLLoss, "__call__", 8),
    "final exponents": (exponents, "search_exponents", 5),
    "training": (training, "train", 1),
    "held out": (Comparison, "run", 1),
}


class Killed(BaseException):
    """As a signal would."""


def search(model, tokens, state=None, **changes):
    return calibrate(model, tokens, 0.5, "wisparse", settings=dataclasses.replace(ALL, **changes), state=state)


def counted(monkeypatch, dies=None):
    """Count the calls of every stage's function; the named stage dies at its call."""
    counts = {}

    def wrap(home, function):
        made = getattr(home, function)

        def run(*args, **kwargs):
            key = f"{home.__name__}.{function}"
            counts[key] = counts.get(key, 0) + 1
            if dies is not None and STAGES[dies] == (home, function, counts[key]):
                raise Killed
            return made(*args, **kwargs)

        monkeypatch.setattr(home, function, run)

    for home, function in {(home, function) for home, function, _ in STAGES.values()}:
        wrap(home, function)
    return counts


@pytest.fixture(scope="module")
def whole(tiny_model, tiny_tokens):
    """The plan of a search that nothing stops, and how often it calls what."""
    with pytest.MonkeyPatch.context() as patch:
        counts = counted(patch)
        return search(tiny_model, tiny_tokens), counts


def assert_same(one, other):
    for name in ("exponents", "sparsities", "thresholds", "realised"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.basis.digest() == other.basis.digest()
    for field in ("gains", "biases"):
        pair = getattr(one, field), getattr(other, field)
        assert (pair[0] is None) == (pair[1] is None)
        for a, b in zip(*((own or []) for own in pair), strict=True):
            assert all(np.array_equal(a[n], b[n]) for n in a)
    assert one.history == other.history and one.held_out == other.held_out


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_search_goes_on_to_the_same_plan(tiny_model, tiny_tokens, tmp_path, monkeypatch, capsys, whole, stage):
    state = tmp_path / "state"
    with monkeypatch.context() as patch:
        before = counted(patch, stage)
        with pytest.raises(Killed):
            search(tiny_model, tiny_tokens, state)
    assert state.is_dir()
    with monkeypatch.context() as patch:
        after = counted(patch)
        plan = search(tiny_model, tiny_tokens, state)
    assert_same(plan, whole[0])
    # Moments come before the first result that is kept.
    assert ("going on with the search in" in capsys.readouterr().err) == (stage != "moments") and state.exists()
    for name, calls in whole[1].items():
        # The call that was killed is made again, and up to four populations that were not written yet.
        again = before.get(name, 0) + after.get(name, 0) - calls
        assert 0 <= again <= (5 if name.startswith("KLLoss") else 1), (name, again)


def test_another_search_does_not_take_over_the_state(tiny_model, tiny_tokens, tmp_path, monkeypatch):
    state = tmp_path / "state"
    with monkeypatch.context() as patch:
        counted(patch, "gains")
        with pytest.raises(Killed):
            search(tiny_model, tiny_tokens, state)
    for changes in ({"seed": 1}, {"sparsity": 0.4}, {"settings": SearchSettings()}, {"method": "wina"}):
        arguments: dict[str, Any] = {"sparsity": 0.5, "method": "wisparse", "settings": ALL} | changes
        with pytest.raises(WisparseError, match="is of another search, or damaged"):
            calibrate(tiny_model, tiny_tokens, state=state, **arguments)
    with pytest.raises(WisparseError, match="is of another search"):
        calibrate(tiny_model, tiny_tokens[:, ::-1], 0.5, "wisparse", settings=ALL, state=state)
    for package in ("jax", "jaxlib.version"):  # another version rounds otherwise
        with monkeypatch.context() as patch:
            patch.setattr(f"{package}.__version__", "0.9.9")
            with pytest.raises(WisparseError, match="is of another search"):
                search(tiny_model, tiny_tokens, state)
    assert state.is_dir()


def test_what_the_user_had_there_is_left_alone(tiny_model, tiny_tokens, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(WisparseError, match="is of another search, or damaged"):
        search(tiny_model, tiny_tokens, tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_damaged_state_is_refused_in_one_line(tmp_path):
    state = SearchState(tmp_path / "state", "x")
    state.keep("a b", lambda: {"one": np.arange(3)})
    assert SearchState(tmp_path / "state", "x").keep("a b", dict)["one"].tolist() == [0, 1, 2]
    for file in (tmp_path / "state" / "a_b").rglob("*"):
        if file.is_file():
            file.write_bytes(b"?")
    with pytest.raises(WisparseError, match="a_b: the state of the search is damaged") as caught:
        SearchState(tmp_path / "state", "x").keep("a b", dict)
    assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(WisparseError, match="file: the state of the search cannot be kept here"):
        SearchState(tmp_path / "file", "x")


def test_a_command_goes_on_from_a_state_with_results_until_it_ends(tmp_path):
    def hint() -> str:
        return last_words("").removeprefix("; the same command goes on from what is kept in ")

    goes_on_from(None)
    place = Place(tmp_path / "state", goes_on_from)
    state = SearchState(place, "x")
    assert hint() == ""
    state.keep("one", lambda: {"a": np.arange(3)})
    assert hint() == str(tmp_path / "state")
    goes_on_from(None)  # as another process
    again = SearchState(place, "x")
    assert hint() == str(tmp_path / "state")
    for file in (tmp_path / "state" / "one").rglob("*"):
        if file.is_file():
            file.write_bytes(b"?")
    with pytest.raises(WisparseError):
        again.keep("one", dict)
    assert hint() == ""
    again.keep("two", lambda: {"a": np.arange(3)})
    assert hint() != ""
    (tmp_path / "state.removed" / "two").mkdir(parents=True)  # of a run that was killed while it removed
    remove_state(place)
    assert not list(tmp_path.iterdir())
    assert hint() == ""


def test_a_state_goes_where_it_cannot_be_renamed(tmp_path):
    SearchState(tmp_path / "state", "x").keep("one", lambda: {"a": np.arange(3)})
    (tmp_path / "state.removed").write_text("mine")
    remove_state(tmp_path / "state")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_state_that_cannot_be_written_is_one_line(tmp_path, run_python):
    """A limit on the size of files, which fails as a full disk does."""
    code = (
        "import resource, sys, pathlib, numpy as np\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from wisparse_jax.search.state import SearchState\nfrom wisparse_jax.errors import WisparseError\n"
        "arrays = {str(i): np.random.default_rng(i).normal(size=9_000) for i in range(20)}\n"
        "try: SearchState(pathlib.Path(sys.argv[1]), 'x').keep('gains', lambda: arrays)\n"
        "except WisparseError as error: print(error)"
    )
    done = run_python(code, tmp_path)
    assert done.stdout.startswith(f"{tmp_path / 'gains'}: cannot be written by Orbax: ") and not done.stderr
    assert not (tmp_path / "gains").exists()


def test_writes_that_fail_after_the_first_say_nothing(tmp_path, run_python):
    """Each array's write fails some turns of the event loop after the one before, so some fail unheard."""
    code = (
        "import asyncio, itertools, logging, pathlib, sys, numpy as np, tensorstore\n"
        "from wisparse_jax.errors import WisparseError\nfrom wisparse_jax.files.arrays import write_arrays\n"
        "turns = itertools.count()\n"
        "async def fails(*_, **__):\n"
        "    for _ in range(next(turns)): await asyncio.sleep(0)\n"
        "    raise OSError('full')\n"
        "tensorstore.open = fails\n"
        "try: write_arrays(pathlib.Path(sys.argv[1]) / 'a', {str(i): np.ones(9) for i in range(20)})\n"
        "except WisparseError as error: print(error)\n"
        "logging.getLogger('asyncio').error('Task exception was never retrieved: of someone else')"
    )
    done = run_python(code, tmp_path)
    assert done.stdout.strip() == f"{tmp_path / 'a'}: cannot be written by Orbax: full"
    assert done.stderr.count("\n") == 1 and done.stderr.rstrip().endswith("of someone else")


def test_answers_are_replayed_in_order_and_not_asked_again(tmp_path):
    def answers(state, asked):
        told = state.journal("p")
        return [
            float(told(lambda q: (asked.append(float(q[0])), q * 2)[1], np.array([float(k)]))[0]) for k in range(12)
        ]

    first, second = [], []
    assert answers(SearchState(tmp_path / "s", "x"), first) == [2.0 * k for k in range(12)]
    assert answers(SearchState(tmp_path / "s", "x"), second) == [2.0 * k for k in range(12)]
    assert first == list(range(12)) and second == [10, 11]


def test_identities_tell_what_differs_apart():
    a = np.arange(6, dtype=np.int32)
    made = [identity_of(*parts) for parts in ((a,), (a.reshape(2, 3),), (a.astype(np.int64),), ("a", "b"), ("ab", ""))]
    assert len({*made, identity_of(json.loads('{"x": 1}'))}) == 6
    assert identity_of({"x": 1, "y": 2}) == identity_of({"y": 2, "x": 1})


IDENTITIES = {
    "another": '"other"',
    "no JSON": "{",
    "another type": "[]",
    "a number of 5,000 digits": "9" * 5000,
    "deep": "[" * 100_000,
    "no text": b"\xff",
    "large": " " * (2 << 20),
}


@pytest.mark.parametrize("kind", [*IDENTITIES, "a pipe", "a folder", "missing beside others"])
def test_a_folder_of_something_else_is_refused(tmp_path, kind):
    known = tmp_path / "identity.json"
    if kind == "a pipe":
        os.mkfifo(known)
    elif kind == "a folder":
        known.mkdir()
    elif kind == "missing beside others":
        (tmp_path / "stage").mkdir()
    else:
        text = IDENTITIES[kind]
        known.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(WisparseError) as caught:
        SearchState(tmp_path, "own")
    assert str(caught.value) == f"{tmp_path}: is of another search, or damaged; remove it, or name another folder"


@pytest.mark.parametrize("left", [[], ["identity.json.new"]])
def test_a_run_that_was_killed_at_its_beginning_is_gone_on_with(tmp_path, capsys, left):
    for name in left:
        (tmp_path / name).write_text('"ow')
    SearchState(tmp_path, "own")
    assert capsys.readouterr().err == ""
    SearchState(tmp_path, "own").keep("the basis", lambda: {"Q": np.eye(2)})
    assert capsys.readouterr().err == ""
    SearchState(tmp_path, "own")
    assert capsys.readouterr().err == f"wisparse: going on with the search in {tmp_path}, results kept: 1\n"


def test_what_a_killed_run_was_writing_is_no_result(tmp_path, capsys):
    """Named as Orbax names it, and replaced by what is found again."""
    SearchState(tmp_path, "own")
    (tmp_path / f"the_basis{ocp.utils.TMP_DIR_SUFFIX}").mkdir()
    state = SearchState(tmp_path, "own")
    assert capsys.readouterr().err == ""
    state.keep("the basis", lambda: {"Q": np.eye(2)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["identity.json", "lock", "the_basis"]


def test_two_processes_do_not_search_in_one_folder(tmp_path, run_python):
    """The second is told who is there; one that was killed holds nothing, and a process may go on with its own."""
    code = (
        "import sys, pathlib\nfrom wisparse_jax.search.state import SearchState, check_unused\n"
        "from wisparse_jax.errors import WisparseError\nfolder = pathlib.Path(sys.argv[1])\n"
        "for look in (check_unused, lambda folder: SearchState(folder, 'x')):\n"
        "    try: look(folder)\n"
        "    except WisparseError as error: print(error)\n"
    )
    folder = tmp_path / "state"
    assert run_python(code, folder).stdout == "" and (folder / "lock").is_file()
    held = [SearchState(folder, "x"), SearchState(folder, "x")]
    found = run_python(code, folder)
    said = f"{folder}: in use by process {os.getpid()}, which searches for the same plan\n"
    assert found.stdout == 2 * said and not found.stderr
    del held[0]
    assert run_python(code, folder).stdout == 2 * said
    held.clear()
    gc.collect()
    assert run_python(code, folder).stdout == ""
