"""From a prompt's text to an answer's text, piece by piece: chat templates, stop texts, and how an answer ended."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from wisparse_jax.errors import WisparseError
from wisparse_jax.inference.generate import NEW_TOKENS, token_stream
from wisparse_jax.inference.sampling import GREEDY, Sample
from wisparse_jax.inference.stream import TextStream
from wisparse_jax.models.model import Model
from wisparse_jax.models.tokenizer import Tokenizer

# A conversation: messages with a "role" and a "content", a text or a list of parts {"type": "text", "text": ...}.
Messages = Sequence[Mapping[str, Any]]

# Tokens that a conversation may grow to, at least, before anything is compiled for it anew.
ROOM_TO_GROW = 512
# Whose contents templates rewrite: thoughts are left out of older answers, results of tools put into JSON.
_REWRITTEN = ("assistant", "tool", "ipython", "function")


def stream(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Messages,
    max_new_tokens: int = NEW_TOKENS,
    sampler: Sample = GREEDY,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    raw: bool = False,
    system: str | None = None,
    implementation: str | None = None,
    hold: bool = True,
) -> Answer:
    """Answer a prompt: `for piece in stream(model, tokenizer, "Hello"): print(piece, end="")`.

    A text goes through the tokenizer's chat template where it has one, as in `wisparse generate`; without one, or with
    `raw`, it is continued. An answer ends at the tokens that end a sequence by the model's configuration, and where
    there is a template also at the tokenizer's own, which some models alone end their turns with.

    What runs a conversation's first turn also runs its next ones: nothing is compiled before a prompt has more than 512
    tokens, and more than the first one with its answer.

    Args:
        model: dense or sparse.
        tokenizer: of the model.
        prompt: a text, or a conversation.
        max_new_tokens: at most so many tokens are chosen.
        sampler: greedy by default.
        seed: same seed, same text.
        stop: the answer ends before this text, or any of these, of which special tokens may be a part.
        raw: continue the text without a chat template.
        system: what a conversation's system message says; for a text only.
        implementation: of the decode step, see `generate`.
        hold: keep what is skipped at the plan's target, see `generate`.

    Returns:
        An iterator of the answer's text, which knows afterwards how it ended.

    Raises:
        WisparseError: as `generate`; also what `encode_prompt` refuses, or an empty stop text.
    """
    ids = encode_prompt(tokenizer, prompt, raw, system)
    stop = (stop,) if isinstance(stop, str) else stop
    if any(not text for text in stop):
        raise WisparseError("stop: expected texts, found an empty one")
    realised: list[float] = []
    ends, grows_to = (), 0
    if tokenizer.inner.chat_template is not None and not raw:
        ends = tokenizer.inner.eos_token_id
        ends = () if ends is None or ends >= model.config.vocab_size else (ends,)
    if not isinstance(prompt, str):
        grows_to = max(ROOM_TO_GROW, len(ids) + max_new_tokens)
    tokens = token_stream(
        model, [ids], max_new_tokens, sampler, seed, implementation, hold=hold, realised=realised,
        grows_to=grows_to, ends=ends,
    )  # fmt: skip
    return Answer(tokenizer, ids, tokens, max_new_tokens, stop, realised)


def encode_prompt(
    tokenizer: Tokenizer, prompt: str | Messages, raw: bool = False, system: str | None = None
) -> list[int]:
    """Token ids of a text or a conversation; see `stream`.

    Raises:
        WisparseError: the model has no chat template where one is needed, or it refuses the conversation; a message
            that is no role and text; a conversation with `raw`, or with two system messages.
    """
    template = tokenizer.inner.chat_template
    if isinstance(prompt, str) and (raw or template is None):
        if system is not None:
            reason = "a text that is continued has none" if raw else "the model has no chat template"
            raise WisparseError(f"system: expected no system message, as {reason}")
        return tokenizer.encode(prompt)
    if template is None:
        raise WisparseError("messages: expected a text, as the model has no chat template")
    if raw:
        raise WisparseError("raw: expected a text, which is continued as it is, found the messages of a conversation")
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [_message(message, number) for number, message in enumerate(given, 1)]
    if system is not None:
        if any(message["role"] == "system" for message in messages):
            raise WisparseError("system: expected none beside the conversation's own system message")
        messages.insert(0, {"role": "system", "content": system})
    # The template writes what stands before a text itself.
    return tokenizer.encode(templated(tokenizer.inner, messages), bos=False)


def templated(tokenizer: Any, messages: Sequence[Mapping[str, Any]], opens_answer: bool = True) -> str:
    """A conversation as a transformers tokenizer's template writes it, up to where an answer begins.

    Args:
        tokenizer: a tokenizer of transformers.
        messages: the conversation; contents are texts.
        opens_answer: begin the next answer; otherwise the last message goes on.

    Raises:
        WisparseError: there is no template, or it refuses the conversation, or leaves out what the system or the user
            says, or a role that they do not know, as some do without a word.
    """
    if tokenizer.chat_template is None:
        raise WisparseError("the model has no chat template")
    how = {"add_generation_prompt": opens_answer, "continue_final_message": not opens_answer}
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **how)
    except Exception as error:  # a template is a program, and can fail as any does
        reason = str(error) or type(error).__name__
        raise WisparseError(f"the model's chat template refuses the conversation: {reason}") from None
    written = "".join(text.split())
    for number, message in enumerate(messages, 1):
        said = None if message["role"] in _REWRITTEN else message["content"]
        if said is not None and "".join(said.split()) not in written:
            raise WisparseError(f"the model's chat template leaves out message {number}, of the {message['role']}")
    return text


def _message(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A message whose content is one text, as templates take it; what calls a tool may have none."""
    if not isinstance(message, Mapping):
        raise WisparseError(f"message {number}: expected a role and a content, found {str(message)[:60]!r}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise WisparseError(f"message {number}: role: expected a text such as 'user', found {role!r}")
    if isinstance(content, list):
        content = "".join(_text(part, f"message {number}: content") for part in content)
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise WisparseError(f"message {number}: content: expected a text or a list of parts, found {content!r}")
    return {**message, "content": content}


def _text(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise WisparseError(f'{where}: expected parts {{"type": "text", "text": ...}}, found {str(part)[:60]}')
    return text


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
        realised: Sequence[float] = (),
    ):
        self.prompt, self.tokens, self.text = prompt, list[int](), ""
        self.stop_reason: str | None = None
        self._source, self._room, self._realised = tokens, max_new_tokens, realised
        self._tokenizer, self._stream = tokenizer, TextStream(tokenizer.decode, prompt, tokenizer.open_byte)
        self._stop = StopTexts(stop)

    @property
    def sparsity(self) -> float | None:
        """The share of the weights that the sparse tokens so far have skipped; None where there are none."""
        return self._realised[0] if self._realised else None

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
            piece = self._shown(new[0])
            if self._stop.found:
                self.stop_reason = "stop"
        self.text += piece
        return piece

    def _shown(self, tokens: list[int]) -> str:
        """The text of new tokens that can be shown; special tokens are none, but may be what the answer stops at."""
        shown, at = "", 0
        for end, token in enumerate(tokens, 1):
            if self._stop and (special := self._tokenizer.special(token)):
                shown += self._stop.add(self._stream.add(tokens[at:end], closed=True))
                shown += self._stop.add(special, shown=False)
                at = end
        return shown + self._stop.add(self._stream.add(tokens[at:]))


class StopTexts:
    """Passes text on up to the first stop text; what may be the beginning of one waits."""

    def __init__(self, stop: Sequence[str]):
        self._stop, self._held = tuple(stop), ""
        self._shown: list[bool] = []  # of the characters held: special tokens are looked at, but not passed on
        self.found = False

    def __bool__(self) -> bool:
        """Whether there is anything to stop at."""
        return bool(self._stop)

    def add(self, piece: str, shown: bool = True) -> str:
        """The text that can be shown, if it is text that is shown."""
        if self.found:
            return ""
        self._held, self._shown = self._held + piece, self._shown + [shown] * len(piece)
        text = self._held
        if places := [at for at in (text.find(stop) for stop in self._stop) if at >= 0]:
            self.found = True
            return self._pass(min(places))
        lengths = (n for stop in self._stop for n in range(min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        return self._pass(len(text) - max(lengths, default=0))

    def rest(self) -> str:
        """What waited for a stop text that did not come."""
        return "" if self.found else self._pass(len(self._held))

    def _pass(self, count: int) -> str:
        text = "".join(itertools.compress(self._held[:count], self._shown))
        self._held, self._shown = self._held[count:], self._shown[count:]
        return text


def first_stop(tokenizer: Any, ids: Sequence[int], after: int, stop: Sequence[str]) -> int | None:
    """After how many tokens, more than `after`, their text has a stop text, of which special tokens may be a part.

    The text is that of a tokenizer of transformers for these ids alone; None is never, an empty stop text none.
    """

    def stops(count: int) -> bool:
        text = tokenizer.decode(ids[:count], skip_special_tokens=False)
        return any(found in text for found in stop if found)

    return next((n for n in range(after + 1, len(ids) + 1) if stops(n)), None) if stops(len(ids)) else None
