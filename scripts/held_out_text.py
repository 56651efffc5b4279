"""Excerpts of the documents that `pretrain_demo.py` held out, in two halves that share no document.

    python scripts/held_out_text.py gutenberg.txt.xz --out held_out --characters 30000

writes `held_out/calibration.txt` from every other held-out document and `held_out/evaluation.txt` from the rest.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro
from pretrain_demo import HELD_OUT_EVERY, read_documents
from tyro.conf import Positional


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write excerpts of the held-out documents."""

    text: Positional[Path]
    out: Path
    characters: int = 30_000  # from the middle of each document


def main() -> None:
    """Write both files."""
    args = tyro.cli(Arguments, description=__doc__)
    args.out.mkdir(parents=True)
    documents = read_documents(args.text)[::HELD_OUT_EVERY]
    for name, half in (("calibration", documents[::2]), ("evaluation", documents[1::2])):
        excerpts = [middle(document, args.characters) for document in half]
        (args.out / f"{name}.txt").write_text("\n\n".join(excerpts), encoding="utf-8")


def middle(document: str, characters: int) -> str:
    """The middle of a document, whole words."""
    start = max(0, (len(document) - characters) // 2)
    return document[start : start + characters].partition(" ")[2]


if __name__ == "__main__":
    main()
