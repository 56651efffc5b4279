"""`wisparse generate`."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from tyro.conf import Positional, UseAppendAction

from wisparse_jax.commands.devices import OnDevices
from wisparse_jax.commands.options import Unset
from wisparse_jax.commands.writer import Writer, Writing, cut_off
from wisparse_jax.errors import WisparseError


@dataclasses.dataclass(frozen=True)
class Generate(OnDevices, Writing):
    """Answer or continue prompts, streaming to the terminal."""

    model: Positional[str]
    """A folder, a hub id, or `demo`."""
    prompt: Unset[str | None] = None
    """The text: of a question where the model has a chat template, to be continued where it has none."""
    prompts: Unset[str | None] = None
    """Many texts: a file with one a line, or a .jsonl file of objects with `prompt` or `messages`; - is standard input,
    of JSON lines if it begins with {."""
    raw: Unset[bool] = False
    """Continue the text, also where the model has a chat template."""
    system: Unset[str | None] = None
    """What the system message of the chat template says."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """End before this text; may be given several times."""
    json: Unset[bool] = False
    """Print one JSON object for each prompt and nothing else: text, token counts, stop reason, seconds, tok/s."""

    def run(self) -> None:
        """Answer every prompt and print the texts."""
        asked = self._prompts()
        writer = Writer(self, self.model)
        for number, prompt in enumerate(asked, 1):
            try:
                writer.check(prompt, self.raw, self.system)
            except WisparseError as error:
                where = "" if self.prompts is None else f"{self._source()}: prompt {number} of {len(asked)}: "
                raise WisparseError(f"{where}{error}") from None
        writer.load()
        continues = self.raw or not writer.chats
        for number, prompt in enumerate(asked):
            answer = writer.answer(prompt, self.stop, self.raw, self.system)
            # A text that is continued goes out with the first tokens: a refused request prints nothing.
            shown = [prompt] if isinstance(prompt, str) and continues else []
            if number and not self.json:
                shown.insert(0, "---\n")

            def show(piece: str, shown: list[str] = shown) -> None:
                if not self.json:
                    print("".join([*shown, piece]), end="", flush=True)
                shown.clear()

            timing = writer.write(answer, show)
            if self.json:
                # JSON is UTF-8, or else ASCII: an encoding of a terminal's own would show codes that are no JSON.
                utf_8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
                print(json.dumps(_record(prompt, answer, timing), ensure_ascii=not utf_8), flush=True)
                continue
            print()
            if not answer.tokens and answer.stop_reason == "end":
                print("the model ended its answer before the first token", file=sys.stderr)
            print(f"load {writer.load_seconds:.1f} s, {timing}{cut_off(answer)}", file=sys.stderr)

    def _source(self) -> str:
        return "standard input" if self.prompts == "-" else str(self.prompts)

    def _prompts(self) -> list[Any]:
        from wisparse_jax.evaluation.windows import read_text

        if (self.prompt is None) == (self.prompts is None):
            raise WisparseError("expected either --prompt TEXT or --prompts FILE")
        if self.prompts is None:
            return [self.prompt]
        where = self._source()
        text = _standard_input() if self.prompts == "-" else read_text(self.prompts)
        # Not splitlines, which also splits at characters that may stand within a text, such as U+2028.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if not lines:
            raise WisparseError(f"{where}: expected a prompt a line, found none")
        if self.prompts.endswith(".jsonl") or (self.prompts == "-" and lines[0][1].startswith("{")):
            return [_parsed(line, f"{where}: line {number}") for number, line in lines]
        return [line for _, line in lines]


def _standard_input() -> str:
    if sys.stdin is None:  # closed
        return ""
    try:
        return sys.stdin.read().removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        raise WisparseError(f"standard input: not readable as UTF-8 text: {error}") from None


def _parsed(line: str, where: str) -> Any:
    from pydantic_core import from_json

    try:
        raw = from_json(line)
    except ValueError as error:
        raise WisparseError(f"{where}: not readable as JSON: {error}") from None
    prompts = [raw[key] for key in ("prompt", "messages") if isinstance(raw, dict) and key in raw]
    messages = [m for m in prompts if isinstance(m, list) and m and all(isinstance(x, dict) for x in m)]
    if len(prompts) != 1 or not (isinstance(prompts[0], str) or messages):
        raise WisparseError(f"{where}: expected an object with a text `prompt` or a list `messages`, found {line[:60]}")
    return prompts[0]


def _record(prompt: Any, answer: Any, timing: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": answer.text,
        "prompt_tokens": len(answer.prompt),
        "new_tokens": len(answer.tokens),
        "stop_reason": answer.stop_reason,
        "compile_seconds": round(timing.compile, 3),
        "first_token_seconds": round(timing.first_token, 3),
        "seconds": round(timing.total, 3),
        "tokens_per_second": None if timing.rate is None else round(timing.rate, 2),
        "sparsity": None if timing.sparsity is None else round(timing.sparsity, 4),
    }
