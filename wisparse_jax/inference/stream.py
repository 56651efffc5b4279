"""Token ids to text as they come, without half characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from wisparse_jax.models.tokenizer import shared_start


class TextStream:
    """Turns growing token ids into pieces of text that concatenate to what they add to the text of a prompt.

    Args:
        decode: the text of token ids, as `Tokenizer.decode`.
        prompt: the ids that the stream goes on from; some tokenizers write the first token of a text without its space.
        open_byte: a token that begins a character and does not end it, where one that follows a whole character of
            bytes undoes it: `Tokenizer.open_byte`. What could be undone waits.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = (), open_byte: int | None = None
    ):
        self._decode, self._open_byte = decode, open_byte
        self._ids = list(prompt)
        self._prompt = decode(self._ids)
        self._shown: int | None = None  # characters of the text of all ids; None until there is something to show

    def add(self, ids: Sequence[int], closed: bool = False) -> str:
        """The text that the new ids make certain; a character whose last bytes are missing waits.

        Nothing that comes undoes what a special token at the end has `closed`.
        """
        self._ids.extend(ids)
        text = self._decode(self._ids)
        if self._open_byte is not None and not closed:
            text = text[: shared_start(text, self._decode([*self._ids, self._open_byte]))]
        return self._show(text.rstrip("\ufffd"))

    def rest(self) -> str:
        """What is left at the end, incomplete characters included."""
        return self._show(self._decode(self._ids))

    def _show(self, text: str) -> str:
        # The prompt may end within a character, of which its own text has a sign that stands for what is missing.
        shown = shared_start(self._prompt, text) if self._shown is None else self._shown
        piece = text[shown:]
        if piece:
            self._shown = len(text)
        return piece
