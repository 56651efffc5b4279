"""Compiled programs kept on disk between runs of the command, by JAX's persistent compilation cache."""

from __future__ import annotations

import os
from pathlib import Path

from wisparse_jax.errors import WisparseError
from wisparse_jax.files import expanded

VARIABLE = "WISPARSE_COMPILATION_CACHE"
OFF = "off"
# Beyond it the programs that were not used for longest go.
LARGEST_BYTES = 2 * 2**30


def use_compilation_cache(choice: str | None = None) -> Path | None:
    """Have this process keep what it compiles; call before JAX is imported.

    Args:
        choice: a folder, or "off"; None is what the environment variable WISPARSE_COMPILATION_CACHE says, then what
            JAX's own JAX_COMPILATION_CACHE_DIR says, then a folder of the user's cache directory.

    Returns:
        The folder, or None where nothing is kept.

    Raises:
        WisparseError: it is something else than a folder.
    """
    choice = choice or os.environ.get(VARIABLE)
    if choice == OFF:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return None
    if choice is None and "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if choice is None:
        from platformdirs import user_cache_path

        folder = user_cache_path("wisparse", appauthor=False) / "compiled"
    else:
        folder = expanded(choice).absolute()
        if os.path.lexists(folder) and not folder.is_dir():
            raise WisparseError(f"compilation cache {folder}: expected a folder, or {OFF}")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    # JAX keeps only what took a second to compile; a model's loading and its first token have many smaller programs.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(LARGEST_BYTES))
    return folder
