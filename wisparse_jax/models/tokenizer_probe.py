"""A trial of a tokenizer.json in a process of its own: `tokenizer_probe.py FILE PATH` prints `usable`, or why not.

PATH is the `sys.path` to import from, as JSON: what the caller imports is not always where an interpreter by itself
looks. The first line that is printed is `STARTED`, without which nothing was tried.

The Rust library panics on some damaged files, aborts on others, and a hostile normaliser grows text until the memory
is full. Here that costs one short-lived process. Imports nothing of this package, so that it starts at once.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

STARTED = "trial"
MEMORY = 8 << 30  # bytes of address space
LARGEST_ID = 2**31 - 1
LARGEST_GROWTH = 64  # times that normaliser or decoder may make a text longer


def main(path: str) -> None:
    """Load, encode every character of Unicode's first plane, decode every token."""
    # A process that is limited already may only be limited further.
    limits = (n for n in resource.getrlimit(resource.RLIMIT_AS) if n != resource.RLIM_INFINITY)
    bound = min((MEMORY, *limits))
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    import tokenizers

    check(path)
    tokenizer = tokenizers.Tokenizer.from_file(path)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    token, largest = max(ids.items(), key=lambda item: item[1], default=("", 0))
    if largest > LARGEST_ID:
        raise ValueError(f"token {token!a} has the id {largest}, beyond int32")
    # In pieces: a tokenizer without words would take the whole for one.
    for start in range(0, 0x10000, 0x400):
        text = "".join(chr(i) for i in range(start, start + 0x400) if not 0xD800 <= i < 0xE000)
        tokenizer.encode(text, add_special_tokens=True)
    for number in ids.values():
        tokenizer.decode([number], skip_special_tokens=False)


def check(path: str) -> None:
    """What of a trial needs no process of its own.

    Raises:
        ValueError: not JSON, or a normaliser or decoder that makes texts far longer.
    """
    with open(path, encoding="utf-8") as file:
        raw = json.load(file)
    for part in ("normalizer", "decoder"):
        if (growth := _growth(raw.get(part))) > LARGEST_GROWTH:
            raise ValueError(f"the {part} makes a text up to {growth:.3g} times as long")


def _growth(part: Any) -> float:
    """The factor by which the replacements of a normaliser or decoder, one behind the other, can lengthen a text."""
    if isinstance(part, list):
        total = 1.0
        for step in part:
            total *= _growth(step)
        return total
    if not isinstance(part, dict):
        return 1.0
    total = 1.0
    if part.get("type") == "Replace" and isinstance(part.get("content"), str):
        pattern = part.get("pattern")
        text = pattern.get("String") if isinstance(pattern, dict) else None
        # A regular expression may match one character, or none between any two.
        total = (
            max(1.0, len(part["content"]) / max(len(text), 1)) if isinstance(text, str) else 1 + len(part["content"])
        )
    return total * _growth(part.get("normalizers")) * _growth(part.get("decoders"))


if __name__ == "__main__":
    try:
        sys.path[:] = json.loads(sys.argv[2])
        import tokenizers  # noqa: F401 - not there: nothing can be tried

        print(STARTED, flush=True)
        main(sys.argv[1])
    except BaseException as error:  # Rust's panics are no Exception
        print((str(error).strip() or type(error).__name__).splitlines()[0])
    else:
        print("usable")
