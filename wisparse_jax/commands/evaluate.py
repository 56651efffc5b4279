"""`wisparse evaluate`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tyro.conf import Positional

from wisparse_jax.commands.devices import Devices


@dataclasses.dataclass(frozen=True)
class Evaluate(Devices):
    """Measure perplexity, KL(dense || sparse) and realised sparsity on a text, or the scores of tasks."""

    model: Positional[str]
    """A folder, a hub id, or `demo`."""
    text: str | None = None
    """A UTF-8 file, or `self` for text that the dense model samples."""
    tasks: str | None = None
    """Instead of a text: tasks of lm-evaluation-harness, commas between them; `wisparse lm-eval` has more options."""
    plan: Path | None = None
    """The plan; without one only the dense model is measured."""
    tokens: int | None = None
    """Tokens of text to read, rounded up to whole windows; by default all of a file, 16,384 of `self`."""
    sparse_prefill: float = 0.5
    """Share of each window, at its end, that runs sparse and is scored."""
    window: int | None = None
    """Tokens in a window; by default the model's context, at most 2,048."""
    seed: int = 1
    """Seed of self-sampled text."""
    weights: str | None = None
    """int8 or int4 measures the model with such block weights against the model as it is, dense and with the plan."""
    head: str | None = None
    """int8 does the same with such a head."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def run(self) -> None:
        """Evaluate and print."""
        from wisparse_jax.arguments import check_count, check_seed, check_share
        from wisparse_jax.errors import WisparseError
        from wisparse_jax.evaluation import evaluate, text_windows
        from wisparse_jax.inference import sample_windows
        from wisparse_jax.models.hub import resolve
        from wisparse_jax.models.llama import Llama
        from wisparse_jax.models.loading import check_kinds, load, load_tokenizer, read_model_config
        from wisparse_jax.models.mesh import make_mesh
        from wisparse_jax.processes import is_first
        from wisparse_jax.sparsity import SparseLlama, SparsityPlan, apply

        # Everything that can be refused is refused before the model is loaded.
        if (self.text is None) == (self.tasks is None):
            raise WisparseError("expected either --text FILE or --tasks NAMES")
        if self.tasks is not None and self.mesh is not None:
            raise WisparseError("mesh: expected --text, as --tasks runs on one device")
        check_seed(self.seed)
        check_share(self.sparse_prefill, "sparse-prefill")
        check_kinds(weights=self.weights)
        if self.tokens is not None:
            check_count(self.tokens, "tokens", least=1)
        plan = None if self.plan is None else SparsityPlan.load(self.plan)
        if self.text is None:
            self._run_tasks()
            return
        config = read_model_config(resolve(self.model, ("config",)))
        window = min(config.context, 2048) if self.window is None else self.window
        if check_count(window, "window, in tokens", least=2) > config.context:
            raise WisparseError(f"window = {window}: longer than the model's context of {config.context}")
        mesh = None if self.mesh is None else make_mesh(self.mesh, config, self.weights)
        windows = None
        if self.text != "self":
            windows = text_windows(load_tokenizer(self.model), self.text, window, self.tokens)

        model = load(self.model, check=None if plan is None else plan.check_model, mesh=mesh)
        rounded = [kind for kind in (self.weights, self.head and f"{self.head} head") if kind is not None]
        basis = None if plan is None or not rounded else plan.basis
        measured = load(self.model, weights=self.weights, basis=basis, head=self.head, mesh=mesh) if rounded else model
        sparse = None if plan is None else apply(measured, plan)
        if windows is None:
            tokens = 16_384 if self.tokens is None else self.tokens
            windows = sample_windows(model, -(-tokens // window), window, seed=self.seed, progress=is_first())
        plans: dict[str, Llama | SparseLlama] = {}
        if rounded:
            plans[f"dense {', '.join(rounded)}"] = measured
        if plan is not None and sparse is not None:
            plans[plan.method] = sparse
        result = evaluate(model, windows, plans, self.sparse_prefill, progress=is_first())
        if self.json:
            settings = {"model": self.model, "text": self.text, "plan": None if self.plan is None else str(self.plan)}
            settings |= {"weights": self.weights, "head": self.head}
            stated = {} if plan is None else {"method": plan.method, "target": plan.target}
            print(json.dumps(result.as_json(next(reversed(plans), None)) | settings | stated, allow_nan=False))
            return
        from wisparse_jax.report.tables import console, layer_table, quality_table

        show = console()
        share = f"the last {self.sparse_prefill:.0%} of each window sparse"
        show.print(quality_table(result, f"{result.tokens} tokens of {self.text}, {share}"))
        if plan is not None:
            show.print(layer_table(result.sparse[plan.method]))

    def _run_tasks(self) -> None:
        from wisparse_jax.commands.lm_eval import run_harness

        given = {"pretrained": self.model, "plan": self.plan, "weights": self.weights}
        given["sparse_prefill"] = None if self.plan is None else self.sparse_prefill
        words = [f"{name}={value}" for name, value in given.items() if value is not None]
        run_harness(["run", "--model_args", *words, "--tasks", str(self.tasks)])
