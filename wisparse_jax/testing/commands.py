"""The command line in this process, and a text for it."""

from __future__ import annotations

from pathlib import Path

PROSE = (
    "The harbour was quiet when the boats came home. A boy sat on the wall and counted them as they passed the light. "
    "He knew every one by the sound of its engine, and he knew that one was missing. "
)


def run(command: str, folder: str | Path) -> None:
    """Run `wisparse` with the words of a string, in which {f} stands for the folder."""
    from wisparse_jax.cli import main

    main([word.format(f=folder) for word in command.split()])
