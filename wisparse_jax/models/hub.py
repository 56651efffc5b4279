"""From the MODEL that a user names to a folder on this machine."""

from __future__ import annotations

import contextlib
import glob
import importlib.resources
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from wisparse_jax.errors import WisparseError
from wisparse_jax.files import expanded
from wisparse_jax.models import tokenizer, weights
from wisparse_jax.models.other_checkpoints import ADAPTER

DEMO = "demo"
CONFIG = ("config.json", "generation_config.json", ADAPTER)
EVERYTHING = ("config", "weights", "tokenizer")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def resolve(name: str | Path, parts: Sequence[str] = EVERYTHING) -> Path:
    """The local folder of a model: a folder, `demo` (the model in this package) or a hub id `org/name`.

    A folder comes before a hub id of the same spelling; the folder `demo` itself is `./demo`. A hub id is downloaded
    (or found in the cache) with huggingface_hub, the files of the given parts only; of several copies of the weights,
    the one that is read. Without the hub, what the cache has is used, and what it lacks is for the reader to miss.

    Raises:
        WisparseError: no such folder, no such repository, or no network; says which.
    """
    if name == DEMO:
        return Path(str(importlib.resources.files("wisparse_jax") / "demo_model"))
    # os.path's questions have an answer for any text, pathlib's raise for a name too long or a user that there is not.
    path = expanded(name)
    if name and os.path.isdir(path):
        return path
    if path.suffix == ".gguf" and os.path.isfile(path):
        raise WisparseError(f"{path} is a GGUF file: make a model folder of it first: wisparse convert {path} OUT")
    if name and os.path.exists(path):
        raise WisparseError(f"{path} is a file: expected a model folder, a hub id (org/name) or '{DEMO}'")
    if isinstance(name, Path) or not spells_repository(name):
        raise WisparseError(f"{str(name)!r}: no such folder: expected a model folder, a hub id (org/name) or '{DEMO}'")
    return _download(name, parts)


def spells_repository(name: str) -> bool:
    """Whether a name is spelled as `org/name` is."""
    return _HUB_ID.fullmatch(name) is not None


def is_hub_id(name: str | Path) -> bool:
    """Whether a name is spelled as `org/name` is, and is not a file or folder here."""
    return isinstance(name, str) and spells_repository(name) and not expanded(name).exists()


def _download(name: str, parts: Sequence[str]) -> Path:
    with explained(f"{name}: no such folder here, and as a hub id"):
        folder = snapshot(name, CONFIG)
        if "tokenizer" in parts:
            snapshot(name, tokenizer.FILES)
        if "weights" in parts:
            # Some repositories hold a second copy under another name, or in shards beside the whole.
            snapshot(name, (weights.SINGLE, weights.INDEX))
            if not (folder / weights.SINGLE).exists() and (folder / weights.INDEX).exists():
                snapshot(name, [glob.escape(shard) for shard in weights.shards(folder)])
        return folder


@contextlib.contextmanager
def explained(
    lead: str, error: type[WisparseError] = WisparseError, otherwise: str = "it was not downloaded:"
) -> Iterator[None]:
    """What goes wrong between here and the hub, as one line that begins with `lead`; `otherwise` before others' words.

    Raises:
        WisparseError: of the kind `error`.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise error(f"{lead} it is gated: accept its terms on the hub and log in (hf auth login)") from None
    except errors.RepositoryNotFoundError:
        raise error(f"{lead} there is no such repository, or it is private") from None
    except errors.LocalEntryNotFoundError:
        raise error(f"{lead} it is not in the cache and the hub cannot be reached (no network?)") from None
    except errors.HfHubHTTPError as problem:
        answer, said = problem.response, _line(problem.server_message or problem)
        login = "; log in with a token that may do this: hf auth login" if answer.status_code in (401, 403) else ""
        raise error(f"{lead} {otherwise} {answer.status_code} {answer.reason_phrase}: {said}{login}") from None
    except Exception as problem:
        # The bases are an error of the HTTP client, which other failures to get an answer are as well, and OSError.
        if not isinstance(problem, (errors.HFValidationError, *errors.HfHubHTTPError.__bases__)):
            raise
        silent = isinstance(problem, ConnectionError) or not isinstance(problem, ValueError | OSError)
        raise error(f"{lead} {otherwise} {'the hub cannot be reached: ' * silent}{_line(problem)}") from None


def _line(problem: Exception | str) -> str:
    return " ".join(str(problem).split()) or type(problem).__name__


def snapshot(name: str, patterns: Sequence[str]) -> Path:
    """The folder in the cache that holds the files of a repository that match, as far as there are any."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except errors.LocalEntryNotFoundError as error:
        incomplete = getattr(error, "snapshot_path", None)
        if incomplete is None:
            raise
        return Path(incomplete)
