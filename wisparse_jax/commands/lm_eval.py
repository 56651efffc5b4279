"""`wisparse lm-eval`: lm-evaluation-harness's own command line, with this package's models among its own."""

from __future__ import annotations

import dataclasses
import sys

from tyro.conf import Positional

from wisparse_jax.errors import WisparseError, first_line

NAME = "lm-eval"
_COMMANDS = ("run", "ls", "validate")


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
        WisparseError: lm-evaluation-harness is not installed, does not know a task, or cannot fetch a task's data.
    """
    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.api.registry import model_registry  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise WisparseError(
            f"lm-eval needs lm-evaluation-harness ({error.name} is missing): pip install 'wisparse-jax[eval]'"
        ) from None
    if "wisparse" not in model_registry:
        model_registry.register("wisparse", target="wisparse_jax.harness:WisparseLM")
    given = list(arguments)
    if given and given[0] not in (*_COMMANDS, "-h", "--help"):
        given.insert(0, "run")
    asks_for_help = {"-h", "--help"} & {*given}
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
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        missing = str(error).partition(": ")[2]
        raise WisparseError(
            f"tasks: {missing} not found: expected some of those that `wisparse lm-eval ls tasks` lists, or FILE.yaml"
        ) from None
    finally:
        sys.argv = before
