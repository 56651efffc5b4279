"""Signals at random moments of every command: each must end it with 130 or 143, one line and nothing half-written.

    python scripts/signal_trial.py --trials 60 --commands calibrate generate evaluate convert

A tiny random model is written to a temporary folder. Each command runs once to its end, which says how long it takes
and what it leaves; then it is started again and again, and stopped after a random share of that time. `search`, which
is calibrate with its default method, and `demo` take minutes: `--longest` bounds the moments. Outcomes:

    stopped     128 + the signal's number, one line on standard error, no output but a whole one
    finished    the signal came when the work was done: exit 0 and the whole output
    starting    the signal came before Python ran the first line of this package
    wrong       anything else, printed
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from wisparse_jax.interruption import WORDS
from wisparse_jax.search.state import kept

SETTINGS = """\
window: 32
tokens: 256
statistics_tokens: 64
compare_teal: false
absolute_steps: 2
skipped_steps: 2
heads_steps: 0
gradient_tokens: 64
training_steps: 2
"""
PLAN = Path(__file__).resolve().parent.parent / "tests/fixtures/format-1/plan"
SEARCH = ".out.search"  # where calibrate goes on from, on purpose
COMMANDS = {
    "calibrate": "calibrate {model} --out {out} --config {folder}/settings.yaml --method teal",
    "search": "calibrate {model} --out {out} --config {folder}/settings.yaml",
    "generate": "generate {model} --prompt Harbours --max-new-tokens 200 --temperature 1",
    "evaluate": "evaluate {model} --text self --tokens 2048 --json",
    "convert": "convert {model} {out}",
    "report": "report {folder}/plan --out {out}",
    "demo": "demo --out {out}",
}
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How one run ended; `left` are the files of the folder that it may write to."""

    code: int
    err: str
    seconds: float  # from the signal to the end
    left: frozenset[str]
    goes_on: bool  # whether a search has results to go on from


def run(command: str, folder: Path, after: float | None = None, number: signal.Signals = signal.SIGINT) -> Ended:
    """Run a command of `COMMANDS` in an empty `folder / "work"`, with a signal after so many seconds, or none."""
    work = folder / "work"
    work.mkdir()
    text = COMMANDS[command].format(model=folder / "model", out=work / "out", folder=folder)
    arguments = [sys.executable, "-m", "wisparse_jax", *text.split()]
    # What is stopped may leave half a program in a cache.
    environment = os.environ | {"WISPARSE_COMPILATION_CACHE": "off"}
    with subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        if after is not None:
            time.sleep(after)
            process.send_signal(number)
        began = time.perf_counter()
        _, err = process.communicate()
    paths = (path.relative_to(work) for path in work.rglob("*"))
    # Orbax names files by what they hold and when.
    left = frozenset(re.sub(r"[0-9a-f]{32}", "*", str(path)) for path in paths if path.parts[0] != SEARCH)
    seconds = time.perf_counter() - began
    goes_on = kept(work / SEARCH) > 0
    subprocess.run(["rm", "-rf", work], check=True)
    return Ended(process.returncode, err, seconds, left, goes_on)


def outcome(ended: Ended, whole: frozenset[str], number: signal.Signals) -> str:
    """Which of the outcomes above it was."""
    # Progress bars stay on standard error where it is no terminal; one method has the name of the program.
    lines = [line for line in ended.err.splitlines() if line.startswith("wisparse: ") and "|" not in line]
    words, _, going_on = "".join(lines).partition("; the same command goes on from ")
    said = words == f"wisparse: {WORDS[number]}" and len(lines) == 1 and (ended.goes_on or not going_on)
    if ended.code == 128 + number and said and "Traceback" not in ended.err:
        return "stopped" if ended.left in (frozenset(), whole) else "wrong"
    if ended.code == 0 and not lines and ended.left == whole:
        return "finished"
    before = ended.code == -number and not lines and not ended.left
    return "starting" if before and "wisparse_jax" not in ended.err else "wrong"


def prepare(folder: Path) -> None:
    """The model, the plan and the settings that the commands read."""
    from wisparse_jax.testing import write_tiny_folder

    write_tiny_folder(folder / "model")
    (folder / "settings.yaml").write_text(SETTINGS)
    shutil.copytree(PLAN, folder / "plan")


def main() -> None:
    """Try, print every wrong outcome and a table; exits with 1 if there was one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60, help="of each command")
    parser.add_argument(
        "--commands", nargs="+", choices=COMMANDS, default=[c for c in COMMANDS if c not in ("demo", "search")]
    )
    parser.add_argument("--longest", type=float, default=float("inf"), help="seconds after which no signal is sent")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder, draw = Path(name), random.Random(args.seed)
        prepare(folder)
        for command in args.commands:
            began = time.perf_counter()
            whole = run(command, folder)
            duration = min(time.perf_counter() - began, args.longest)
            assert whole.code == 0, whole.err
            counts: collections.Counter[str] = collections.Counter()
            slowest = 0.0
            for trial in range(args.trials):
                after, number = draw.uniform(0, duration), SIGNALS[trial % len(SIGNALS)]
                ended = run(command, folder, after, number)
                kind = outcome(ended, whole.left, number)
                counts[kind] += 1
                if kind == "stopped":
                    slowest = max(slowest, ended.seconds)
                if kind == "wrong":
                    wrong += 1
                    print(f"{command}, signal {number} after {after:.2f} s: {ended}", flush=True)
            shares = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
            print(f"{command}: {shares}; up to {slowest:.1f} s from signal to end; {duration:.1f} s long", flush=True)
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
