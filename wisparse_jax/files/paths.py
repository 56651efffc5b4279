"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with the home folder for its `~`, which no shell replaces in `--out=~/plan` or in Python.

    A user that there is not stays as it is; a folder that is called `~` is `./~`.
    """
    return Path(os.path.expanduser(path))
