"""From a prompt's text to an answer's text, piece by piece: chat templates, stop texts, and how an answer ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from wisparse_jax.errors import WisparseError
from wisparse_jax.inference.generate import NEW_TOKENS, Generator, token_stream
from wisparse_jax.inference.sampling import GREEDY, Sample
from wisparse_jax.inference.stream import TextStream
from wisparse_jax.models.tokenizer import Tokenizer

# A conversation: messages with a "role" and a "content".
Messages = Sequence[Mapping[str, str]]


def stream(
    model: Generator,
    tokenizer: Tokenizer,
    prompt: str | Messages,
    max_new_tokens: int = NEW_TOKENS,
    sampler: Sample = GREEDY,
    seed: int = 0,
    stop: Sequence[str] = (),
    raw: bool = False,
    system: str | None = None,
    implementation: str | None = None,
) -> Answer:
    """Answer a prompt: `for piece in stream(model, tokenizer, "Hello"): print(piece, end="")`.

    A text goes through the tokenizer's chat template where it has one, as in `wisparse generate`; without one, or with
    `raw`, it is continued.

    Args:
        model: dense or sparse.
        tokenizer: of the model.
        prompt: a text, or a conversation.
        max_new_tokens: at most so many tokens are chosen.
        sampler: greedy by default.
        seed: same seed, same text.
        stop: the answer ends before any of these texts.
        raw: continue the text without a chat template.
        system: what a conversation's system message says; for a text only.
        implementation: of the decode step, see `generate`.

    Returns:
        An iterator of the answer's text, which knows afterwards how it ended.

    Raises:
        WisparseError: as `generate`; also a conversation or a system message for a model without a chat template, an
            empty stop text, or a template that refuses the conversation.
    """
    ids = encode_prompt(tokenizer, prompt, raw, system)
    if any(not text for text in stop):
        raise WisparseError("stop: expected texts, found an empty one")
    tokens = token_stream(model, [ids], max_new_tokens, sampler, seed, implementation)
    return Answer(tokenizer, ids, tokens, max_new_tokens, stop)


def encode_prompt(
    tokenizer: Tokenizer, prompt: str | Messages, raw: bool = False, system: str | None = None
) -> list[int]:
    """Token ids of a text or a conversation; see `stream`.

    Raises:
        WisparseError: the model has no chat template where one is needed, or it refuses the conversation.
    """
    template = tokenizer.inner.chat_template
    if isinstance(prompt, str) and (raw or template is None):
        if system is not None:
            reason = "a text that is continued has none" if raw else "the model has no chat template"
            raise WisparseError(f"system: expected no system message, as {reason}")
        return tokenizer.encode(prompt)
    if template is None:
        raise WisparseError("messages: expected a text, as the model has no chat template")
    messages = [
        dict(message) for message in ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    ]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    from jinja2 import TemplateError

    try:
        text = tokenizer.inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise WisparseError(f"the model's chat template refuses the conversation: {error}") from None
    # The template writes what stands before a text itself.
    return tokenizer.encode(text, bos=False)


class Answer(Iterator[str]):
    """The pieces of an answer as they come; what it was, once there are no more.

    `stop_reason` is "end" (the model ended its answer), "stop" (a stop text came) or "length" (no room for more), None
    before the end. The first piece is of the first token alone.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        tokens: Iterator[list[list[int]]],
        max_new_tokens: int,
        stop: Sequence[str] = (),
    ):
        self.prompt, self.tokens, self.text = prompt, list[int](), ""
        self.stop_reason: str | None = None
        self._source, self._room = tokens, max_new_tokens
        self._stream = TextStream(tokenizer.decode, prompt, tokenizer.open_byte)
        self._stop = StopTexts(stop)

    def __next__(self) -> str:
        if self.stop_reason is not None:
            raise StopIteration
        new = next(self._source, None)
        if new is None:
            piece = self._stop.add(self._stream.rest()) + self._stop.rest()
            full = len(self.tokens) >= self._room
            self.stop_reason = "stop" if self._stop.found else "length" if full else "end"
        else:
            self.tokens.extend(new[0])
            piece = self._stop.add(self._stream.add(new[0]))
            if self._stop.found:
                self.stop_reason = "stop"
        self.text += piece
        return piece


class StopTexts:
    """Passes text on up to the first stop text; what may be the beginning of one waits."""

    def __init__(self, stop: Sequence[str]):
        self._stop, self._held = tuple(stop), ""
        self.found = False

    def add(self, piece: str) -> str:
        """The text that can be shown."""
        if self.found:
            return ""
        text = self._held + piece
        if places := [at for at in (text.find(stop) for stop in self._stop) if at >= 0]:
            self.found, self._held = True, ""
            return text[: min(places)]
        lengths = (n for stop in self._stop for n in range(min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        kept = len(text) - max(lengths, default=0)
        self._held = text[kept:]
        return text[:kept]

    def rest(self) -> str:
        """What waited for a stop text that did not come."""
        held, self._held = self._held, ""
        return held
