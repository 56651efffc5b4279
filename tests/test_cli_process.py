"""The command as a process: what it does with its environment, its output, and signals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import signal_trial

from wisparse_jax.interruption import WORDS

START = [sys.executable, "-m", "wisparse_jax"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in `model`, and settings."""
    folder = tmp_path_factory.mktemp("process")
    signal_trial.prepare(folder)
    return folder


def start(folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command in the folder, with environment variables of its own."""
    here = str(Path.cwd())
    return subprocess.run(
        [*START, *args], cwd=folder, env={**os.environ, "PYTHONPATH": here, **env}, capture_output=True
    )


def last_line(run: subprocess.CompletedProcess[bytes]) -> str:
    """The one line of an error."""
    lines = run.stderr.decode().splitlines()
    assert [line for line in lines if line.startswith("wisparse: ")] == lines[-1:] and "Traceback" not in lines
    return lines[-1]


SETTINGS = {
    "JAX_ENABLE_X64": ("True", "generate model --prompt x"),
    "JAX_TRANSFER_GUARD": ("disallow", "evaluate model --text self"),
    "JAX_DEBUG_NANS": ("1", "calibrate model --out out"),
    "JAX_PLATFORMS": ("cuda", "generate model --prompt x"),
    "JAX_PLATFORM_NAME": ("nonsense", "generate model --prompt x"),
    "JAX_DEFAULT_DEVICE": ("nonsense", "convert model out"),
    "JAX_NO_TRACING": ("1", "convert model out"),
    "JAX_DEFAULT_MATMUL_PRECISION": ("nonsense", "generate model --prompt x"),
    "JAX_CHECK_TRACER_LEAKS": ("perhaps", "convert model out"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_jax_that_cannot_be_are_refused_by_name(folder: Path, name: str) -> None:
    value, command = SETTINGS[name]
    if name == "JAX_PLATFORMS" and Path("/dev/nvidia0").exists():
        pytest.skip("there is one")
    run = start(folder, *command.split(), **{name: value})
    assert run.returncode == 2 and run.stdout == b""
    assert last_line(run).startswith(f"wisparse: error: {name} = {value}: ")


def test_a_user_may_forbid_every_promotion(folder: Path) -> None:
    strict = {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
    run = start(folder, "evaluate", "model", "--text", "self", "--tokens", "64", "--json", **strict)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["tokens"] > 0


def test_an_input_that_is_closed_is_an_empty_one(folder: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.stdin = None; from wisparse_jax.cli import main; main()"]
    run = subprocess.run(
        [*command, "generate", str(folder / "model"), "--prompts", "-"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert run.stderr == "wisparse: error: standard input: expected a prompt a line, found none\n"


def test_an_output_of_another_encoding_shows_the_codes(folder: Path) -> None:
    run = start(folder, "convert", "model", "é☃", PYTHONIOENCODING="ascii")
    assert (run.returncode, run.stdout) == (0, b"\\xe9\\u2603\n"), run.stderr


def test_a_prompt_that_is_no_text_is_refused(folder: Path) -> None:
    run = subprocess.run(
        [*START, "generate", str(folder / "model"), "--prompt", b"two \xff"], capture_output=True, check=False
    )
    assert run.returncode == 2 and run.stdout == b""
    assert "not UTF-8 text" in last_line(run)


def test_an_output_that_is_closed_early_is_a_line(folder: Path) -> None:
    command = [*START, "convert", str(folder / "model"), str(folder / "early")]
    with subprocess.Popen(command, stdout=-1, stderr=-1) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 141 and err == "wisparse: error: standard output was closed before the end\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_without_room_is_a_line(folder: Path) -> None:
    with open("/dev/full", "wb") as full:
        command = [*START, "convert", str(folder / "model"), str(folder / "full")]
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE)
    assert run.returncode == 2 and "No space left on device" in last_line(run)  # pyright: ignore


def test_standard_streams_may_be_closed(folder: Path) -> None:
    command = f"{sys.executable} -m wisparse_jax convert {folder / 'model'} {folder / 'closed'} >&- 2>&- <&-"
    assert subprocess.run(["sh", "-c", command]).returncode == 0
    assert (folder / "closed" / "wisparse.json").is_file()


def test_a_defect_shows_its_traceback_and_where_to_report_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wisparse_jax.cli import main

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("wisparse_jax.models.hub.resolve", broken)
    with pytest.raises(SystemExit) as caught:
        main(["generate", "demo", "--prompt", "x"])
    err = capsys.readouterr().err
    assert caught.value.code == 1 and "Traceback" in err and "ZeroDivisionError: ours" in err
    assert "please report" in err.splitlines()[-1]


# The long version of this: scripts/signal_trial.py.
@pytest.mark.parametrize(
    ("command", "earliest", "latest"), [("calibrate", 0.2, 3), ("calibrate", 3, 10), ("convert", 0.2, 4)]
)
@pytest.mark.parametrize("number", list(WORDS)[:2])
def test_a_signal_at_any_moment_is_a_line_and_leaves_nothing(
    folder: Path, command: str, earliest: float, latest: float, number: signal.Signals
) -> None:
    moment = random.Random(f"{command} {earliest} {number}").uniform(earliest, latest)
    ended = signal_trial.run(command, folder, moment, number)
    whole = ended.left if ended.code == 0 else frozenset[str]()
    assert signal_trial.outcome(ended, whole, number) in ("stopped", "finished"), ended
