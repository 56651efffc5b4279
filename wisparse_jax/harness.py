"""lm-evaluation-harness on a model, dense or with a plan (needs the `eval` extra: `pip install 'wisparse-jax[eval]'`).

```python
import lm_eval
from wisparse_jax.harness import WisparseLM

results = lm_eval.simple_evaluate(WisparseLM(sparse, tokenizer), tasks=["arc_easy"])
```
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Type checks run where the harness is not installed, too.
try:
    from lm_eval import utils  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
except ModuleNotFoundError as missing:
    from wisparse_jax.errors import WisparseError

    raise WisparseError(
        f"evaluation tasks need lm-evaluation-harness ({missing.name} is missing): pip install 'wisparse-jax[eval]'"
    ) from None

from wisparse_jax.arguments import check_seed, request_seeds
from wisparse_jax.bars import bar
from wisparse_jax.commands.plans import plan_of
from wisparse_jax.errors import WisparseError, first_line
from wisparse_jax.evaluation.log_likelihood import TOKENS_AT_ONCE, Request, score_continuations
from wisparse_jax.inference import Sample
from wisparse_jax.inference.generate import token_stream
from wisparse_jax.inference.text import first_stop, templated
from wisparse_jax.inference.transformers_settings import read_generation_settings, sampler_of
from wisparse_jax.models.fingerprint import model_fingerprint
from wisparse_jax.models.hub import resolve
from wisparse_jax.models.loading import load_tokenizer
from wisparse_jax.models.model import Model
from wisparse_jax.models.tokenizer import Tokenizer
from wisparse_jax.sparsity import load

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What a request for a text asks for: new tokens at most, what to stop at, and how to sample."""

    new: int
    until: tuple[str, ...]
    sampler: Sample


class WisparseLM(TemplateLM):
    """A model for the harness: `--model wisparse --model_args pretrained=MODEL,plan=PLAN`, or around loaded objects.

    Prompts are encoded, texts sampled and ended as the harness's own Hugging Face model does: settings of generation
    are transformers', those that are not honoured here are refused, and where a task is silent a named model's
    generation_config.json speaks.

    Args:
        pretrained: a loaded model, dense or sparse, or a folder, a hub id or `demo`.
        tokenizer: of a loaded model; of a named one it is loaded too.
        plan: a plan for a named model, a folder or a hub id; by default the one that it was converted with, if any.
        sparse_prefill: share of a prompt, at its end, that runs sparse when continuations are scored; the continuation
            is sparse as a whole, and generation starts from a dense prompt. It is stated in the results.
        weights, dtype, head: of a named model, as in `wisparse_jax.load`.
        batch_size: sequences that are generated together; likelihoods are batched by `tokens_at_once`.
        max_length: at most so many tokens of a request count; by default the model's context.
        max_gen_toks: new tokens of a generation where the task does not say.
        tokens_at_once: tokens of a batch whose likelihoods are computed together.
        seed: what a sampled text is drawn from, with its task, its prompt and its number among repeats, and nothing
            else; by default from the state of NumPy's generator, which the harness seeds (`--seed`).
        trust_remote_code: of the harness's command line, for data sets; no code of a model runs.
        max_batch_size, device: of the harness's command line, not used.
        unknown: whatever else it was given, which is refused.

    Raises:
        WisparseError: lm-evaluation-harness is not installed, an argument is unknown or missing, or the model or the
            plan cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str | Model | None = None,
        tokenizer: Tokenizer | None = None,
        plan: str | Path | None = None,
        sparse_prefill: float = 0.5,
        weights: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        tokens_at_once: int = TOKENS_AT_ONCE,
        max_batch_size: int | None = None,
        device: str | None = None,
        head: str | None = None,
        seed: int | None = None,
        trust_remote_code: bool = False,
        **unknown: Any,
    ):
        super().__init__()
        # What --model_args says comes here as it is.
        if unknown:
            known = ", ".join(list(inspect.signature(type(self)).parameters)[:-1])
            raise WisparseError(f"model_args: {next(iter(unknown))} is not known: expected some of {known}")
        if pretrained is None:
            raise WisparseError("model_args: pretrained: expected a model, found nothing")
        self.seed = None if seed is None else check_seed(seed)
        self.generation_settings: dict[str, Any] = {}
        if not isinstance(pretrained, str):
            self.name, self.model = type(pretrained).__name__, pretrained
            if tokenizer is None or plan is not None:
                raise WisparseError("a loaded model: expected its tokenizer beside it, and no plan but its own")
        else:
            self.name = pretrained
            chosen = plan_of(pretrained, None if plan is None else str(plan))
            self.model = load(pretrained, dtype, weights, head, plan=chosen)
            tokenizer = load_tokenizer(pretrained) if tokenizer is None else tokenizer
            self.generation_settings = read_generation_settings(resolve(pretrained, ("config",)))
        self.tokenizer = tokenizer.inner
        self.sparse_prefill, self.tokens_at_once, self.max_gen_toks = sparse_prefill, tokens_at_once, max_gen_toks
        self.batch_size = 1 if str(batch_size).startswith("auto") else int(batch_size)
        self.max_length = min(max_length or self.model.config.context, self.model.config.context)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation, by the tokenizer's template; without system messages where it refuses them.

        Raises:
            WisparseError: the model has no chat template, or it refuses the conversation without them, too.
        """
        try:
            return templated(self.tokenizer, chat_history, add_generation_prompt)
        except WisparseError as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            prompt = templated(self.tokenizer, rest, add_generation_prompt)
            utils.warning_once(_LOGGER, f"{error}; system messages are left out")
            return prompt

    def get_model_info(self) -> dict[str, Any]:
        """What the results say about the model."""
        info: dict[str, Any] = {"model_name": self.name, "model_dtype": str(self.model.params["embed"].dtype)}
        info |= {"weights": self.model.weights, "head": self.model.head, "sampling_seed": self.seed}
        info["generation_config"] = self.generation_settings
        info["model_fingerprint"] = model_fingerprint(self.model)
        if self.model.rules is not None:
            info["sparse_prefill"] = self.sparse_prefill
        if (plan := self.model.plan) is not None:
            info |= {"sparse_method": plan.method, "sparsity": plan.target}
        return info

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; with what the tokenizer puts around a text, unless told otherwise or a template has put it."""
        special = add_special_tokens
        if special is None:
            special = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=special))

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Request((context + rest)[-self.max_length - 1 : -len(rest)], rest) for _, context, rest in requests]
        return self._scored(pairs, disable_tqdm)

    def _scored(self, pairs: Sequence[Request], quiet: bool) -> list[tuple[float, bool]]:
        return score_continuations(self.model, pairs, self.sparse_prefill, self.tokens_at_once, progress=not quiet)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each token predicted once, from as much context as the model has."""
        pairs: list[Request] = []
        counts: list[int] = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [Request(*utils.make_disjoint_window(window)) for window in windows]
            pairs += parts
            counts.append(len(parts))
        scores = iter(self._scored(pairs, disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for (text,), total in zip((request.args for request in requests), totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop sequence, longest prompts first, requests of one kind together.

        Raises:
            WisparseError: settings of generation that are not honoured, or cannot be, before anything is generated.
        """
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        kinds: dict[_Asked, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            kinds[self._asked(request)].append(number)
        seeds = request_seeds(self.seed, [(request.task_name, request.idx, request.args[0]) for request in requests])
        texts = [""] * len(requests)
        with bar(total=len(requests), desc="generating", disable=disable_tqdm, leave=False) as shown:
            for asked, numbers in kinds.items():
                numbers.sort(key=lambda number: -len(prompts[number]))
                for at in range(0, len(numbers), self.batch_size):
                    batch = numbers[at : at + self.batch_size]
                    made = self._texts([prompts[n] for n in batch], asked, [seeds[n] for n in batch])
                    for number, text in zip(batch, made, strict=True):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    shown.update(len(batch))
        return texts

    def _asked(self, request: Any) -> _Asked:
        try:
            # The harness's own checks raise what the types of values happen to raise.
            options: dict[str, Any] = dict(normalize_gen_kwargs(dict(request.args[1]), self.max_gen_toks))
            until = [stop for stop in options.pop("until") if stop is not None]
            if not all(isinstance(stop, str) for stop in until):
                raise WisparseError(f"until = {until}: expected texts")
            until = handle_stop_sequences(until, eos=self.tokenizer.decode(self.eot_token_id))
            new = options.pop("max_gen_toks")
            if "max_length" in options:
                raise WisparseError(f"max_length = {options['max_length']!r}: expected max_gen_toks, the new tokens")
            if not 0 < new < self.max_length:
                raise WisparseError(
                    f"max_gen_toks = {new}: expected 1 or above, with room for a prompt in the model's "
                    f"{self.max_length} tokens"
                )
            # Without a temperature the harness gives its own model 0.
            return _Asked(new, tuple(until), sampler_of({"temperature": 0.0} | options, self.generation_settings))
        except (ValueError, TypeError) as error:
            task = "" if request.task_name is None else f"{request.task_name}: "
            raise WisparseError(f"{task}generation_kwargs: {first_line(error)}") from None

    def _texts(self, prompts: list[list[int]], asked: _Asked, seeds: list[int]) -> list[str]:
        cut, until = [prompt[asked.new - self.max_length :] for prompt in prompts], list(asked.until)
        rows: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(rows)))
        for pieces in token_stream(self.model, cut, asked.new, asked.sampler, seeds):
            for b in sorted(open_rows):
                before = len(rows[b])
                rows[b].extend(pieces[b])
                if (end := first_stop(self.tokenizer, rows[b], before, asked.until)) is not None:
                    del rows[b][end:]
                    open_rows.remove(b)
            if not open_rows:
                break
        return [
            postprocess_generated_text(self.tokenizer.decode(row, skip_special_tokens=True), until, None)
            for row in rows
        ]
