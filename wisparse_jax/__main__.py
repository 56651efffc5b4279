"""Where the `wisparse` command starts: signals are answered before anything that takes time is imported."""

from __future__ import annotations

from typing import NoReturn

from wisparse_jax import interruption


def main() -> NoReturn:
    """Run the command line of this process and end the process with its exit code."""
    interruption.watch()
    from wisparse_jax.cli import outcome

    try:
        code, line = outcome()
    except SystemExit as end:
        code, line = end.code if isinstance(end.code, int) else 2, None
    interruption.leave(code, line)


if __name__ == "__main__":
    main()
