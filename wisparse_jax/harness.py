"""lm-evaluation-harness on a model, dense or with a plan (needs the `eval` extra: `pip install 'wisparse-jax[eval]'`).

```python
import lm_eval
from wisparse_jax.harness import WisparseLM

results = lm_eval.simple_evaluate(WisparseLM(sparse, tokenizer), tasks=["arc_easy"])
```
"""

from __future__ import annotations

import inspect
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

from wisparse_jax.commands.plans import plan_of
from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation.log_likelihood import TOKENS_AT_ONCE, Request, score_continuations
from wisparse_jax.inference import Sample
from wisparse_jax.inference.generate import token_stream
from wisparse_jax.models.fingerprint import model_fingerprint
from wisparse_jax.models.llama import Llama
from wisparse_jax.models.loading import load, load_tokenizer
from wisparse_jax.models.tokenizer import Tokenizer
from wisparse_jax.sparsity import SparseLlama, load_sparse


class WisparseLM(TemplateLM):
    """A model for the harness: `--model wisparse --model_args pretrained=MODEL,plan=PLAN`, or around loaded objects.

    Prompts are encoded as the harness's own Hugging Face model encodes them.

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
        max_batch_size, device: of the harness's command line, not used.
        unknown: whatever else it was given, which is refused.

    Raises:
        WisparseError: lm-evaluation-harness is not installed, an argument is unknown or missing, or the model or the
            plan cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str | Llama | SparseLlama | None = None,
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
        **unknown: Any,
    ):
        super().__init__()
        # What --model_args says comes here as it is.
        if unknown:
            known = ", ".join(list(inspect.signature(type(self)).parameters)[:-1])
            raise WisparseError(f"model_args: {next(iter(unknown))} is not known: expected some of {known}")
        if pretrained is None:
            raise WisparseError("model_args: pretrained: expected a model, found nothing")
        self.model: Llama | SparseLlama
        if not isinstance(pretrained, str):
            self.name, self.model = type(pretrained).__name__, pretrained
            if tokenizer is None or plan is not None:
                raise WisparseError("a loaded model: expected its tokenizer beside it, and no plan but its own")
        else:
            self.name = pretrained
            chosen = plan_of(pretrained, None if plan is None else str(plan))
            if chosen is None:
                self.model = load(pretrained, dtype, weights, head=head)
            else:
                self.model = load_sparse(pretrained, chosen, dtype, weights, head)
            tokenizer = load_tokenizer(pretrained) if tokenizer is None else tokenizer
        self.weights, self.head = weights, head
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
        """The prompt of a conversation, by the tokenizer's template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the results say about the model."""
        info: dict[str, Any] = {"model_name": self.name, "model_dtype": str(self.model.params["embed"].dtype)}
        info |= {"weights": self.weights, "head": self.head}
        if isinstance(self.model, Llama):
            return info | {"model_fingerprint": model_fingerprint(self.model)}
        info["sparse_prefill"] = self.sparse_prefill
        if (plan := self.model.plan) is not None:
            info |= {"model_fingerprint": plan.fingerprint, "sparse_method": plan.method, "sparsity": plan.target}
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
        """Texts up to a stop sequence, longest prompts first, requests of one kind together."""
        from tqdm import tqdm

        prompts = [self.tok_encode(request.args[0]) for request in requests]
        kinds: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            kinds[repr(sorted(request.args[1].items()))].append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm, leave=False) as bar:
            for numbers in kinds.values():
                numbers.sort(key=lambda number: -len(prompts[number]))
                for at in range(0, len(numbers), self.batch_size):
                    batch = numbers[at : at + self.batch_size]
                    asked = requests[batch[0]].args[1]
                    for number, text in zip(batch, self._texts([prompts[n] for n in batch], asked), strict=True):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(batch))
        return texts

    def _texts(self, prompts: list[list[int]], asked: dict[str, Any]) -> list[str]:
        options = normalize_gen_kwargs(dict(asked), self.max_gen_toks)
        new, until = options.get("max_gen_toks", self.max_gen_toks), list(options.get("until") or [])
        until = handle_stop_sequences(until, eos=self.tokenizer.decode(self.eot_token_id))
        if new >= self.max_length:
            raise WisparseError(f"max_gen_toks = {new}: leaves no room for a prompt in {self.max_length} tokens")
        sampler = Sample(options.get("temperature", 0.0), options.get("top_k"), options.get("top_p", 1.0))
        rows: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(rows)
        for pieces in token_stream(self.model, [p[new - self.max_length :] for p in prompts], new, sampler):
            for row, piece in zip(rows, pieces, strict=True):
                row.extend(piece)
            texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
            if all(any(stop in text for stop in until if stop) for text in texts):
                break
        return [postprocess_generated_text(text, until, None) for text in texts]
