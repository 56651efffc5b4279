"""What is unfinished is removed, however the body ends, and a process told to end does so."""

import subprocess
import sys
import time

import pytest

from wisparse_jax.interruption import WORDS, shielded, unfinished


def test_what_is_renamed_away_stays_and_the_rest_goes(tmp_path):
    with unfinished(tmp_path / "a"), unfinished(tmp_path / "b"):
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "file").write_text("half")
        with shielded():
            (tmp_path / "a").rename(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_removes_a_file_and_goes_on(tmp_path):
    def write() -> None:
        with unfinished(tmp_path / "file"):
            (tmp_path / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not list(tmp_path.iterdir())


def test_what_was_there_before_is_kept_where_nothing_was_created(tmp_path):
    with unfinished(tmp_path / "never made"):
        pass
    assert not list(tmp_path.iterdir())


BODIES = {
    "python": "while True: pass",
    "a call that python cannot interrupt": "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
    "a callback that swallows exceptions": (
        "import gc\ngc.callbacks.append(lambda *_: time.sleep(0.2))\nwhile True: gc.collect()"
    ),
    "waiting for a lock": "import threading; threading.Event().wait()",
    "a thread that writes on": (
        "import threading\n"
        "def write():\n"
        "    for n in range(10**9):\n"
        "        try: os.mkdir(f'{path}/{n}')\n"
        "        except OSError: pass\n"
        "threading.Thread(target=write, daemon=True).start()\n"
        "time.sleep(60)"
    ),
}


@pytest.mark.parametrize("number", list(WORDS))
@pytest.mark.parametrize("name", BODIES)
def test_a_signal_ends_the_process_with_one_line_and_nothing_left(tmp_path, name, number):
    body = "\n".join("    " + line for line in BODIES[name].splitlines())
    code = (
        # A shell that runs the tests in the background has their SIGINT ignored, nohup their SIGHUP.
        "import os, signal, sys, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "from wisparse_jax import interruption\ninterruption.watch()\n"
        f"path = {str(tmp_path / 'partial')!r}\n"
        "with interruption.unfinished(path):\n    os.mkdir(path); open(path + '/x', 'w').close()\n"
        f"    print('ready', flush=True)\n{body}\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.05)
        process.send_signal(number)
        try:
            out, err = process.communicate(timeout=10)
        finally:
            process.kill()
    assert process.returncode == 128 + number and out == "" and not list(tmp_path.iterdir())
    assert err == f"wisparse: {WORDS[number]}\n"


@pytest.mark.parametrize(("state", "more"), [("'a/.plan.search'", True), ("None", False)])
def test_the_last_line_says_what_the_same_command_goes_on_from(state, more):
    code = (
        "import os, signal, time\nfrom wisparse_jax import interruption\ninterruption.watch()\n"
        f"interruption.goes_on_from('before'); interruption.goes_on_from({state})\n"
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    hint = "; the same command goes on from what is kept in a/.plan.search" if more else ""
    assert (done.returncode, done.stderr) == (143, f"wisparse: terminated{hint}\n")


def test_nohup_is_respected(tmp_path):
    code = (
        "import os, signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from wisparse_jax import interruption\ninterruption.watch()\n"
        "os.kill(os.getpid(), signal.SIGHUP); print('on', flush=True); interruption.leave(3, 'bye')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "on\n", "bye\n")


def test_other_signals_are_left_to_who_handles_them():
    code = (
        "import os, signal, time\nfrom wisparse_jax import interruption\ninterruption.watch()\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled', flush=True))\n"
        "os.kill(os.getpid(), signal.SIGUSR1); time.sleep(0.2)\n"
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "handled\n", "wisparse: terminated\n")
