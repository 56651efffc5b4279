"""Progress bars: one line that is redrawn on a terminal, and a plain line every half minute in a file or a log."""

from __future__ import annotations

import sys
from typing import Any

EVERY = 30.0  # seconds between two plain lines
LINE = "{desc}: {percentage:.0f} %, {elapsed} gone, about {remaining} left"
OWN_FORECAST = "{desc}: {percentage:.0f} %, {elapsed} gone{postfix}"  # of a bar that says itself what is left


def bar(*args: Any, **how: Any) -> Any:
    """A bar of tqdm on standard error, with tqdm's own arguments."""
    from tqdm import tqdm

    if redraws():
        return tqdm(*args, **how)
    line = OWN_FORECAST if "{postfix}" in how.get("bar_format", "") else LINE
    how |= {"file": _Lines(sys.stderr), "mininterval": EVERY, "maxinterval": EVERY, "bar_format": line, "leave": False}
    return tqdm(*args, **how)


def redraws() -> bool:
    """Whether what reads standard error shows a line anew; a notebook does, but says that it is no terminal."""
    return sys.stderr is None or sys.stderr.isatty() or "ipykernel" in sys.modules


class _Lines:
    """A stream that gets each state of a bar as a line of its own; nothing before the first half minute is over."""

    def __init__(self, stream: Any):
        self._stream, self._begun = stream, False

    def write(self, text: str) -> None:
        """A state of a bar; the first, of nothing done, and the blanks that wipe one out are left out."""
        line = text.strip()
        if line and self._begun:
            self._stream.write(f"{line}\n")
        self._begun |= bool(line)

    def flush(self) -> None:
        """Flush the stream that the bar is written to."""
        self._stream.flush()
