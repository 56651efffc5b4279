"""The `wisparse` command line: which commands there are, and how each ends."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import tyro
from tyro.conf import subcommand

from wisparse_jax.commands.calibrate import Calibrate
from wisparse_jax.commands.convert import Convert
from wisparse_jax.commands.demo import Demo
from wisparse_jax.commands.evaluate import Evaluate
from wisparse_jax.commands.generate import Generate
from wisparse_jax.commands.methods import Methods
from wisparse_jax.errors import WisparseError

Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Calibrate, subcommand("calibrate")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Generate, subcommand("generate")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Methods, subcommand("methods")]
)


def main(args: list[str] | None = None) -> None:
    """Run a command line; exits with 2 and one line on bad input, 130 when interrupted."""
    code, line = outcome(args)
    if code:
        print(line, file=sys.stderr)
        raise SystemExit(code)


def outcome(args: list[str] | None = None) -> tuple[int, str | None]:
    """Run a command line; its exit code, and the line that says why it failed.

    Raises:
        SystemExit: --help, or arguments that cannot be understood, which was said.
    """
    # transformers advises to install PyTorch, which nothing here uses.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # XLA would choose a GPU's products by timing them: the same seed would round differently from run to run.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    command = tyro.cli(Command, args=args, prog="wisparse", description="Sparse Llama-family models without training.")
    try:
        command.run()
    except WisparseError as error:
        return 2, f"wisparse: error: {error}"
    except KeyboardInterrupt:
        return 130, "wisparse: interrupted"
    return 0, None
