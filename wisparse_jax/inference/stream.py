"""Token ids to text as they come, without half characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextStream:
    """Turns growing token ids into pieces of text that concatenate to the text of all of them."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0

    def add(self, ids: Sequence[int]) -> str:
        """The text that the new ids make certain; a character whose last bytes are missing waits."""
        self._ids.extend(ids)
        text = self._decode(self._ids)
        whole = text.rstrip("\ufffd")
        piece = whole[self._shown :]
        self._shown = max(self._shown, len(whole))
        return piece

    def rest(self) -> str:
        """What is left at the end, incomplete characters included."""
        piece = self._decode(self._ids)[self._shown :]
        self._shown += len(piece)
        return piece
