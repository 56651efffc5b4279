"""`wisparse chat`."""

from __future__ import annotations

import dataclasses
import io
import sys

from tyro.conf import Positional

from wisparse_jax.commands.options import Unset
from wisparse_jax.commands.writer import Writer, Writing, cut_off
from wisparse_jax.errors import WisparseError


@dataclasses.dataclass(frozen=True)
class Chat(Writing):
    """Talk with a model in the terminal; /reset starts anew, /quit or the end of input leaves."""

    model: Positional[str]
    """A folder, a hub id, or `demo`; it must have a chat template."""
    system: Unset[str | None] = None
    """What the conversation's system message says."""
    max_new_tokens: int = dataclasses.field(default=512, kw_only=True)
    """At most so many tokens an answer."""

    def run(self) -> None:
        """Read questions from standard input and stream an answer to each, until the input ends."""
        writer = Writer(self, self.model)
        if not writer.chats:
            raise WisparseError(f"{self.model}: the model has no chat template; wisparse generate continues a text")
        beginning = [] if self.system is None else [{"role": "system", "content": self.system}]
        # What leaves no room for a first question is refused before the weights are read.
        writer.check([*beginning, {"role": "user", "content": "?"}], raw=False, system=None)
        writer.load()
        print("/reset starts anew, /quit leaves", file=sys.stderr)
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a broken line is refused as a question, like any other
        messages = list(beginning)
        while (line := _line()) not in (None, "/quit"):
            if line == "/reset":
                messages = list(beginning)
                print("a new conversation", file=sys.stderr)
            elif line:
                messages.append({"role": "user", "content": line})
                try:
                    answer = writer.answer(messages)
                    timing = writer.write(answer, lambda piece: print(piece, end="", flush=True))
                except WisparseError as error:
                    messages.pop()
                    print(f"{error}; /reset starts anew", file=sys.stderr)
                    continue
                print(flush=True)
                print(f"{timing}{cut_off(answer)}", file=sys.stderr)
                messages.append({"role": "assistant", "content": answer.text})


def _line() -> str | None:
    """What the user types next; None at the end of input."""
    if sys.stdin is None:  # closed
        return None
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None
