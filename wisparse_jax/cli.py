"""The `wisparse` command line: which commands there are, and how each ends."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import io
import os
import platform
import re
import sys
import traceback
import typing
from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import tyro
from tyro.conf import OmitSubcommandPrefixes, subcommand

from wisparse_jax import __version__
from wisparse_jax.commands.benchmark import Benchmark
from wisparse_jax.commands.calibrate import Calibrate
from wisparse_jax.commands.chat import Chat
from wisparse_jax.commands.convert import Convert
from wisparse_jax.commands.demo import Demo
from wisparse_jax.commands.devices import OnDevices
from wisparse_jax.commands.evaluate import Evaluate
from wisparse_jax.commands.generate import Generate
from wisparse_jax.commands.lists import listed, lists_of
from wisparse_jax.commands.lm_eval import NAME as LM_EVAL
from wisparse_jax.commands.lm_eval import LmEval
from wisparse_jax.commands.methods import Methods
from wisparse_jax.commands.options import REGISTRY, STYLE, NotANumberError, Unset
from wisparse_jax.commands.presets import Presets
from wisparse_jax.commands.push import Push
from wisparse_jax.commands.report import Report
from wisparse_jax.commands.show import Show
from wisparse_jax.commands.sweep import Sweep
from wisparse_jax.compilation_cache import use_compilation_cache
from wisparse_jax.errors import WisparseError, first_line
from wisparse_jax.interruption import goes_on_from, last_words
from wisparse_jax.processes import part

Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Calibrate, subcommand("calibrate")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Sweep, subcommand("sweep")]
    | Annotated[Generate, subcommand("generate")]
    | Annotated[Chat, subcommand("chat")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Benchmark, subcommand("benchmark")]
    | Annotated[Methods, subcommand("methods")]
    | Annotated[Presets, subcommand("presets")]
    | Annotated[Show, subcommand("show")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Push, subcommand("push")]
    | Annotated[LmEval, subcommand(LM_EVAL)]
)
COMMANDS: dict[str, type] = {part.__metadata__[0].name: part.__origin__ for part in typing.get_args(Command)}
NAMES = tuple(COMMANDS)
DEFECT = (
    "wisparse: this is a defect of wisparse, not of what you did: please report the lines above, with the command and "
    "what `wisparse --version` prints, to the issue tracker of wisparse_jax"
)


@dataclasses.dataclass(frozen=True)
class Program:
    """Sparse Llama-family models without training."""

    command: OmitSubcommandPrefixes[Command]
    version: Unset[bool] = False
    """Print the versions of this package and of what it computes with."""
    compilation_cache: Unset[str | None] = None
    """Folder that keeps compiled programs from run to run, or `off`; by default that of the environment variable
    WISPARSE_COMPILATION_CACHE, or one in the user's cache directory."""


def main(args: list[str] | None = None) -> None:
    """Run a command line; exits with 2 and one line on bad input, 130 when interrupted."""
    code, line = outcome(args)
    if code:
        print(line, file=sys.stderr)
        raise SystemExit(code)


def outcome(args: list[str] | None = None) -> tuple[int, str | None]:
    """Run a command line; its exit code, and the line that says why it failed and whether the command can go on.

    2 is bad input, 130 an interruption, 141 an output that its reader closed, 1 a defect, whose traceback was printed.

    Raises:
        SystemExit: --help, or arguments that cannot be understood, which was said.
    """
    goes_on_from(None)
    code, line = _run(args)
    return code, None if line is None else last_words(line)


def _run(args: list[str] | None) -> tuple[int, str | None]:
    # transformers advises to install PyTorch, which nothing here uses.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # XLA would choose a GPU's products by timing them: the same seed would round differently from run to run.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    for stream in (sys.stdout, sys.stderr):
        # What a terminal's encoding lacks is shown by its code.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if args is None else args
    try:
        if list(given) == ["--version"]:
            print(_versions())
            return 0, None
        if given[:1] == [LM_EVAL]:  # its options are the harness's
            program = Program(LmEval(tuple(given[1:])))
        else:
            given = _with_lists(given)
            _check_words(given)
            program = tyro.cli(Program, args=given, prog="wisparse", config=STYLE, registry=REGISTRY)
        if program.version:
            print(_versions())
            return 0, None
        use_compilation_cache(program.compilation_cache)
        command = program.command
        _check_values()
        if isinstance(command, OnDevices):
            command.devices.start()
        _check_environment(command)
        command.run()
        if isinstance(command, OnDevices):
            part()
        if sys.stdout is not None:
            sys.stdout.flush()
    except NotANumberError as error:
        word, expected = error.args
        return 2, f"wisparse: error: {_option_of(word, given)} {word}: {expected}"
    except WisparseError as error:
        return 2, f"wisparse: error: {error}"
    except KeyboardInterrupt:
        return 130, "wisparse: interrupted"
    except BrokenPipeError:
        return 141, "wisparse: error: standard output was closed before the end"
    except Exception as error:
        if (reason := _surroundings(error)) is not None:
            return 2, f"wisparse: error: {reason}"
        traceback.print_exc()
        return 1, DEFECT
    return 0, None


def _versions() -> str:
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "transformers"))
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return f"wisparse_jax {__version__}, {found}, {machine}"


def _check_words(args: Sequence[str]) -> None:
    """Refuse a misspelled command, and an option given twice, of which only the last would count.

    Raises:
        WisparseError: with the command or the option.
    """
    if args and not args[0].startswith("-") and args[0] not in NAMES:
        near = difflib.get_close_matches(args[0], NAMES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(NAMES)}"
        raise WisparseError(f"there is no command {args[0]!r}: {hint}")
    options = (re.fullmatch(r"(--[a-z][\w-]*)(=.*)?", word, re.DOTALL) for word in args)
    counts = Counter(option[1].replace("_", "-") for option in options if option)
    command = next((COMMANDS[word] for word in args if word in COMMANDS), object)
    repeated = lists_of(command)
    if twice := [name for name, count in counts.items() if count > 1 and not repeated.get(name)]:
        raise WisparseError(f"{twice[0]} is given {counts[twice[0]]} times: expected once")


def _with_lists(args: Sequence[str]) -> list[str]:
    """The words of a command line, lists as the command's parser wants them."""
    at = next((i + 1 for i, word in enumerate(args) if word in COMMANDS), 0)
    return [*args[:at], *listed(COMMANDS[args[at - 1]], args[at:])] if at else list(args)


def _option_of(value: str, args: Sequence[str]) -> str:
    """The option that a value was given to."""
    option = ""
    for word in args:
        name, _, attached = word.partition("=")
        option = name if word.startswith("--") else option
        if value in (word, attached):
            break
    return option


def _check_values() -> None:
    """Refuse variables of JAX whose values it cannot read, which it says when it is imported.

    Raises:
        WisparseError: with the variable, where JAX names it, and its value.
    """
    given = [name for name in os.environ if name.startswith("JAX_")]
    if not given:
        return
    try:
        import jax  # noqa: F401
    except ValueError as error:
        said = str(error).lower().replace(".", "_")  # it may be called jax.default_device
        named = max((name for name in given if name.lower() in said), key=len, default=None)
        place = "JAX's variables in the environment" if named is None else f"{named} = {os.environ[named]}"
        raise WisparseError(f"{place}: cannot be: {error}") from None


def _check_environment(command: object) -> None:
    """Refuse settings of JAX that the commands cannot run under, and a platform that is not there, by their names.

    Raises:
        WisparseError: with the variable and its value.
    """
    searches = isinstance(command, Calibrate | Demo | Sweep)
    for names, refused, reason in _JAX_SETTINGS:
        for name in names.split():
            value = os.environ.get(name, "")
            if value.lower() in refused and (searches or name not in _OF_THE_SEARCH):
                raise WisparseError(f"{name} = {value}: {reason}; unset it for this command")
    asked = [name for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_DEFAULT_DEVICE") if os.environ.get(name)]
    if asked:
        import jax

        try:
            jax.devices(os.environ.get("JAX_DEFAULT_DEVICE") or None)
        except (RuntimeError, AssertionError) as error:
            reason = (str(error).strip() or "no such device here").splitlines()[0]
            raise WisparseError(f"{asked[0]} = {os.environ[asked[0]]}: JAX cannot run there: {reason}") from None


_ON = ("1", "t", "true", "y", "yes", "on")
_OF_THE_SEARCH = ("JAX_DEBUG_NANS", "JAX_DEBUG_INFS")
_GUARDS = "JAX_TRANSFER_GUARD JAX_TRANSFER_GUARD_HOST_TO_DEVICE JAX_TRANSFER_GUARD_DEVICE_TO_HOST"
# Variables, the values that are refused, and why.
_JAX_SETTINGS = (
    ("JAX_ENABLE_X64", _ON, "this library computes with 32 bits"),
    (_GUARDS, ("disallow", "disallow_explicit"), "weights and tokens are moved between the host and the device"),
    ("JAX_NO_TRACING", _ON, "nothing has been compiled yet"),
    ("JAX_DEBUG_KEY_REUSE", _ON, "JAX takes a key for each step of a loop for one that is used again"),
    (" ".join(_OF_THE_SEARCH), _ON, "the search starts from values that are not finite"),
)


def _surroundings(error: Exception) -> str | None:
    """Why the machine that the command runs on, not the command, has failed; None for anything else."""
    first = first_line(error)
    if isinstance(error, RuntimeError) and re.search("RESOURCE_EXHAUSTED|OUT_OF_MEMORY", str(error)):
        return f"out of memory (does another process hold the device's?): {first}"
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return None
