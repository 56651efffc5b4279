"""The commands of `wisparse`, a module each: their arguments, and the library's functions called.

Nothing heavy is imported before a command runs, so that `--help` is quick. What can be refused is refused before a
model is loaded.
"""

from __future__ import annotations

from pathlib import Path


def plan_folder(path: Path) -> Path:
    """The folder of a plan, of which the file in it may be named."""
    return path.parent if path.name == "plan.json" and path.is_file() else path
