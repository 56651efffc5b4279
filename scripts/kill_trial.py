"""SIGKILL at random moments of what writes folders: on disk is the old or the new thing, and the next run cleans up.

    python scripts/kill_trial.py --trials 80 --commands convert calibrate demo report

On a tiny random model; `calibrate` by the default method, whose plan must come out bit for bit. Every trial starts a
command, kills it (half of the time at a random moment, half of the time a moment after it began to write), looks at
what is on the disk, runs the command again to its end and looks once more:

    nothing     the place is empty, and so is everything beside it
    litter      the place is empty, a staging folder beside it: the next run has to name and remove it
    whole       the kill came after the folder got its name: it loads
    wrong       anything else, or a second run that fails or leaves something; printed
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from signal_trial import prepare

COMMANDS = {
    "convert": "convert {folder}/model {out}",
    "calibrate": "calibrate {folder}/model --out {out} --config {folder}/settings.yaml",
    "demo": "demo --out {out}",
    "report": "report {folder}/plan --out {out}",
}
STATE = (".out.search", ".out.search.removed")  # what the next run goes on from, or removes without a word
# Imported once, in a process that every trial is a fork of.
PRELOAD = ["wisparse_jax.cli", "wisparse_jax.models.checkpoint", "wisparse_jax.report.demo", "orbax.checkpoint"]
PRELOAD += ["wisparse_jax.report.page", "matplotlib.backends.backend_agg", "jinja2"]


def child(command: str, folder: str, errors: str) -> None:
    """The command of this process, as `python -m wisparse_jax` runs it; its demo is of the tiny model."""
    from wisparse_jax import interruption
    from wisparse_jax.cli import outcome

    log = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    interruption.watch()
    if command == "demo":
        make_demo_tiny(Path(folder))
    code, line = outcome(COMMANDS[command].format(folder=folder, out=f"{folder}/trial/out").split())
    interruption.leave(code, line)


def make_demo_tiny(folder: Path) -> None:
    """Let the demo use the tiny model and next to no budget; what it writes, and when, stays."""
    from wisparse_jax.models import hub
    from wisparse_jax.report import demo
    from wisparse_jax.search import read_settings

    hub.resolve = lambda *_: folder / "model"
    demo.SETTINGS = read_settings(folder / "settings.yaml")
    demo.EVALUATION_WINDOWS = 2


def check_convert(out: Path) -> None:
    """Raises unless the checkpoint is whole."""
    from wisparse_jax.models.loading import load, load_tokenizer

    load(out)
    load_tokenizer(out)


def check_plan(out: Path) -> None:
    """Raises unless the plan is whole."""
    from wisparse_jax.sparsity import SparsityPlan

    SparsityPlan.load(out)


def check_calibrated(out: Path) -> None:
    """Raises unless the plan is the one of a run that was left alone, bit for bit."""
    from wisparse_jax.sparsity import SparsityPlan

    assert SparsityPlan.load(out).has_numbers_of(SparsityPlan.load(out.parent.parent / "reference")), "another plan"


def check_demo(out: Path) -> None:
    """Raises unless every plan and the figures are there."""
    plans = [path for path in out.iterdir() if path.is_dir()]
    assert len(plans) >= 4, plans
    for plan in plans:
        check_plan(plan)
    json.loads((out / "evaluation.json").read_text())


def check_report(out: Path) -> None:
    """Raises unless the page ends and every figure is a whole PNG file."""
    assert (out / "index.html").read_text().rstrip().endswith("</html>")
    figures = list(out.glob("*.png"))
    assert figures and all(figure.read_bytes().endswith(b"IEND\xaeB`\x82") for figure in figures), figures


CHECKS: dict[str, Callable[[Path], None]] = {
    "convert": check_convert,
    "calibrate": check_calibrated,
    "demo": check_demo,
    "report": check_report,
}


class Trials:
    """Runs of one command in `folder`, whose folder `work` is the only place they write to."""

    def __init__(self, command: str, folder: Path, context: Any):
        self.command, self.folder, self.work, self.context = command, folder, folder / "trial", context

    def start(self) -> Any:
        """The command in a process of its own."""
        arguments = (self.command, str(self.folder), str(self.folder / "errors"))
        process = self.context.Process(target=child, args=arguments)
        process.start()
        return process

    def finish(self) -> str:
        """Run to the end; what it said on standard error.

        Raises:
            AssertionError: it failed.
        """
        process = self.start()
        process.join()
        said = (self.folder / "errors").read_text(errors="replace")
        assert process.exitcode == 0, f"exit code {process.exitcode}: {said[-500:]}"
        return said

    def kill(self, after: float, writing: bool) -> bool:
        """Run and kill after so many seconds, from the start or from the first staging folder; whether it ran on."""
        process = self.start()
        while writing and process.is_alive() and not self.left():
            time.sleep(0.001)
        process.join(after)
        process.kill()
        process.join()
        return process.exitcode == -signal.SIGKILL

    def left(self) -> list[str]:
        """What is in the place, without the new folder and the stages of a search, which the next run goes on from."""
        return sorted(name for name in os.listdir(self.work) if name not in ("out", *STATE))

    def look(self) -> str:
        """What is on the disk.

        Raises:
            Exception: a folder that is there and is not whole.
        """
        litter, there = self.left(), (self.work / "out").exists()
        if any(not name.startswith(".out.partial-") for name in litter):
            raise AssertionError(f"left {litter}")
        if there:
            CHECKS[self.command](self.work / "out")
            return "whole"
        return "litter" if litter else "nothing"

    def trial(self, after: float, writing: bool) -> str:
        """One kill and what follows; the kind of outcome."""
        self.work.mkdir()
        try:
            killed = self.kill(after, writing)
            # One without content may belong to a run that has only just begun: it goes without a word.
            kind, litter = self.look(), [name for name in self.left() if (self.work / name / "folder").exists()]
            if kind == "whole":
                shutil.rmtree(self.work / "out")
            said = self.finish()
            unnamed = [name for name in litter if f"removed {self.work / name}" not in said]
            assert not unnamed, f"not named: {unnamed}"
            assert self.look() == "whole" and os.listdir(self.work) == ["out"], f"at last {os.listdir(self.work)}"
            return kind if killed else "finished before"
        finally:
            shutil.rmtree(self.work)


def main() -> None:
    """Try, print every wrong outcome and the counts; exits with 1 if there was one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=80, help="of each command")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder, draw = Path(name), random.Random(args.seed)
        # What was compiled once need not be again: the trials are about what is written.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{name}/compiled"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        prepare(folder)
        for command in args.commands:
            trials, duration = Trials(command, folder, context), 0.0
            for _ in range(2):  # the first compiles
                trials.work.mkdir()
                began = time.perf_counter()
                trials.finish()
                duration = time.perf_counter() - began
                if command == "calibrate" and not (folder / "reference").exists():
                    shutil.copytree(trials.work / "out", folder / "reference")
                assert trials.look() == "whole"
                shutil.rmtree(trials.work)
            counts: collections.Counter[str] = collections.Counter()
            for trial in range(args.trials):
                writing = trial % 2 == 1
                after = draw.uniform(0, 0.05 if writing else 0.9 * duration)
                try:
                    counts[trials.trial(after, writing)] += 1
                except Exception as problem:
                    wrong += 1
                    counts["wrong"] += 1
                    print(f"{command}, {after:.3f} s {'into writing' * writing}: {problem!r}", flush=True)
                if trial % 10 == 9 or trial == args.trials - 1:
                    shares = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
                    print(f"{command}: {trial + 1} trials: {shares}; {duration:.1f} s long", flush=True)
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
