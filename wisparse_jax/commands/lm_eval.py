"""`wisparse lm-eval`: lm-evaluation-harness's own command line, with this package's models among its own."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from wisparse_jax.errors import WisparseError, first_line

NAME = "lm-eval"
_COMMANDS = ("run", "ls", "validate")
_INSTALL = "pip install 'wisparse-jax[eval]'"
# What refuses arguments, tasks and their data by exceptions of its own, whose messages are meant for people.
_REFUSING = {"lm_eval", "datasets", "huggingface_hub", "json", "yaml"}


@dataclasses.dataclass(frozen=True)
class LmEval:
    """Run lm-evaluation-harness: `wisparse lm-eval --model_args pretrained=MODEL,plan=PLAN --tasks TASK ...`."""

    arguments: Positional[tuple[str, ...]] = ()
    """Those of the harness's command line, `wisparse lm-eval --help`; its model is `wisparse` where none is named."""

    def run(self) -> None:
        """Hand everything to the harness."""
        run_harness(list(self.arguments))


def run_harness(arguments: list[str]) -> None:
    """The harness's command line on these arguments.

    Raises:
        WisparseError: lm-evaluation-harness is not installed, does not know a task, cannot fetch a task's data, or
            refuses anything else; where it fails in another way, or a task does, its traceback is printed before.
    """
    given = list(arguments)
    asks_for_help = bool({"-h", "--help"} & {*given})
    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.api.registry import model_registry  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        missing = f"lm-eval needs lm-evaluation-harness ({error.name} is missing): {_INSTALL}"
        if not asks_for_help:
            raise WisparseError(missing) from None
        print(f"{inspect.getdoc(LmEval)}\n\nIts options are the harness's. {missing}")
        return
    if "wisparse" not in model_registry:
        model_registry.register("wisparse", target="wisparse_jax.harness:WisparseLM")
    if given and given[0] not in (*_COMMANDS, "-h", "--help"):
        given.insert(0, "run")
    _check_options(given)
    named = any(word.split("=")[0] in ("--model", "-M", "--config", "-C") for word in given)
    if given[:1] == ["run"] and not asks_for_help and not named:
        given[1:1] = ["--model", "wisparse"]
    before = sys.argv
    sys.argv = [f"wisparse {NAME}", *given]
    try:
        cli_evaluate()
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = first_line(error)
        if isinstance(error, ConnectionError):
            reason += (
                ": a task's data come from the hub once, then from its cache; a task of your own may have local data"
            )
        raise WisparseError(f"lm-evaluation-harness: {reason}") from None
    except WisparseError:
        raise
    except Exception as error:
        if str(error).startswith("Tasks not found"):
            missing = str(error).partition(": ")[2]
            known = "those that `wisparse lm-eval ls tasks` lists, or FILE.yaml"
            raise WisparseError(f"tasks: {missing} not found: expected some of {known}") from None
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if any(_root(name) == _root(__name__) and name != __name__ for name in modules):
            raise  # of this package's own
        refused = isinstance(error, ValueError | AssertionError) and _root(modules[-1]) in _REFUSING
        if refused or _root(type(error).__module__) in _REFUSING:
            reason = first_line(error) + ("" if error.__cause__ is None else f": {first_line(error.__cause__)}")
            raise WisparseError(f"lm-evaluation-harness: {reason}") from None
        traceback.print_exc()
        kind = f"{type(error).__name__}: {first_line(error)}"
        raise WisparseError(
            f"lm-evaluation-harness, or a task of it, failed: {kind}; the lines above say where"
        ) from None
    finally:
        sys.argv = before


def _root(module: str) -> str:
    return module.partition(".")[0]


def _check_options(given: Sequence[str]) -> None:
    """Refuse values that the harness takes, to end in a traceback where it first uses them.

    Raises:
        WisparseError: with the option and its value.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--limit", "-L")
    parser.add_argument("--samples", "-E")
    try:
        found, _ = parser.parse_known_args(given)
    except argparse.ArgumentError:
        return  # the harness says why
    if found.limit is not None:
        try:
            limit = float(found.limit)
        except ValueError:
            return
        if not 0 < limit < float("inf"):
            raise WisparseError(f"limit = {found.limit}: expected a number above 0, below 1 a share of the documents")
    if found.samples is not None:
        try:
            path = Path(found.samples)
            is_file = not found.samples.lstrip().startswith("{") and path.is_file()
            samples = json.loads(path.read_text(encoding="utf-8") if is_file else found.samples)
        except ValueError as error:
            raise WisparseError(f"samples = {found.samples}: not readable as JSON, nor a file: {error}") from None
        if not isinstance(samples, dict):
            raise WisparseError(f'samples = {found.samples}: expected such as {{"task": [0, 1]}}')
