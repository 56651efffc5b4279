"""`wisparse evaluate`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional, UseAppendAction

if TYPE_CHECKING:
    from wisparse_jax.evaluation import Evaluation
    from wisparse_jax.models.config import LlamaConfig
    from wisparse_jax.sparsity import SparsityPlan

from wisparse_jax.commands.devices import OnDevices
from wisparse_jax.commands.options import Unset

NEAR = 0.01  # of its target: a realised sparsity that needs no word


@dataclasses.dataclass(frozen=True)
class Evaluate(OnDevices):
    """Measure perplexity, KL(dense || sparse) and realised sparsity on a text, or the scores of tasks."""

    model: Positional[str]
    """A folder, a hub id, or `demo`."""
    text: Unset[str | None] = None
    """A UTF-8 file, or `self` for text that the dense model samples."""
    tasks: Unset[str | None] = None
    """Instead of a text: tasks of lm-evaluation-harness, commas between them; `wisparse lm-eval` has more options."""
    plan: UseAppendAction[tuple[str, ...]] = ()
    """A plan, a folder or a hub id; may be given several times: plans of one sparsity are then compared at the share
    that TEAL's, or the first one, skips on the text, and differences of KL are paired over windows. Without one only
    the dense model is measured, unless it was converted with a plan."""
    bits: Unset[float | None] = None
    """Of plans for planes: the bits to read of a weight, scales counted, in place of those that they were made at."""
    tokens: Unset[int | None] = None
    """Tokens of text to read, rounded up to whole windows; by default all of a file, 16,384 of `self`."""
    sparse_prefill: float = 0.5
    """Share of each window, at its end, that runs sparse and is scored."""
    hold: Unset[bool] = False
    """Keep what a plan skips at its sparsity, as generation does: token by token, which takes longer."""
    window: Unset[int | None] = None
    """Tokens in a window; by default the model's context, at most 2,048."""
    seed: Unset[int | None] = None
    """Seed of self-sampled text; by default one of its own, not that of a plan's calibration text."""
    weights: Unset[str | None] = None
    """Measures the model with block weights in a format, such as int8, against the model as it is, dense and with the
    plan."""
    head: Unset[str | None] = None
    """int8 does the same with such a head."""
    json: Unset[bool] = False
    """Print one JSON object and nothing else."""

    def run(self) -> None:
        """Score the plans on the text and print the table, or JSON."""
        from wisparse_jax.arguments import check_count, check_seed, check_share
        from wisparse_jax.commands.plans import at_bits, named_plans, plan_of
        from wisparse_jax.commands.texts import SELF, evaluation_seed, note_own_texts, sampled_windows
        from wisparse_jax.errors import WisparseError
        from wisparse_jax.evaluation import evaluate, rivals_of, text_windows
        from wisparse_jax.models.hub import resolve
        from wisparse_jax.models.loading import check_kinds, load, load_tokenizer, read_model_config
        from wisparse_jax.models.mesh import make_mesh
        from wisparse_jax.models.model import Model
        from wisparse_jax.models.quantise import quantise
        from wisparse_jax.processes import is_first
        from wisparse_jax.sparsity import apply

        # Everything that can be refused is refused before the model is loaded.
        if (self.text is None) == (self.tasks is None):
            raise WisparseError("expected either --text FILE or --tasks NAMES")
        if self.tasks is not None and self.devices.mesh is not None:
            raise WisparseError("mesh: expected --text, as --tasks runs on one device")
        if self.tasks is not None and len(self.plan) > 1:
            raise WisparseError(f"--plan is given {len(self.plan)} times: expected at most one with --tasks")
        if self.seed is not None:
            check_seed(self.seed)
        check_share(self.sparse_prefill, "sparse-prefill")
        check_kinds(weights=self.weights, head=self.head)
        if self.tokens is not None:
            check_count(self.tokens, "tokens", least=1)
        plans = named_plans(self.plan)
        if self.text is None:
            for option in ("bits", "tokens", "window", "seed", "hold", "json"):
                if getattr(self, option) not in (None, False):
                    raise WisparseError(f"--{option} is for a --text: tasks do not take it; wisparse lm-eval has more")
            self._run_tasks()
            return
        config = read_model_config(resolve(self.model, ("config",)))
        if not plans and (own := plan_of(self.model, None)) is not None:
            plans = {"its own": own}
        if self.bits is not None:
            plans = {name: plan.at_bits(self.bits) for name, plan in plans.items()}
            if not plans:
                at_bits(None, self.bits)
        seed = 0
        if self.text == SELF:
            seed = evaluation_seed(self.seed, plans)
        note_own_texts(str(self.text), plans)
        if len(plans) == 1:  # a method says more than a folder
            plans = {plan.method: plan for plan in plans.values()}
        window = min(config.context, 2048) if self.window is None else self.window
        if check_count(window, "window, in tokens", least=2) > config.context:
            raise WisparseError(f"window = {window}: longer than the model's context of {config.context}")
        mesh = None if self.devices.mesh is None else make_mesh(self.devices.mesh, config, self.weights)
        windows = None
        if self.text != SELF:
            windows = text_windows(load_tokenizer(self.model), self.text, window, self.tokens)

        def check(fingerprint: str, config: LlamaConfig) -> None:
            for plan in plans.values():
                plan.check_model(fingerprint, config)

        model = load(self.model, check=check, mesh=mesh)
        rounded = ", ".join(kind for kind in (self.weights, self.head and f"{self.head} head") if kind is not None)
        measured: dict[str, Model] = {}
        if rounded:
            measured[f"dense {rounded}"] = quantise(model, self.weights, self.head)
        measured |= apply(model, plans, self.weights, self.head)
        if windows is None:
            tokens = 16_384 if self.tokens is None else self.tokens
            windows, *_ = sampled_windows(model, self.model, window, tokens, seed)
        how = {"progress": is_first(), "hold": self.hold, "rivals": {} if self.hold else rivals_of(measured)}
        result = evaluate(model, windows, measured, self.sparse_prefill, **how)
        if self.json:
            print(json.dumps(self._as_json(result, plans), allow_nan=False))
        else:
            self._print(result, plans)

    def _as_json(self, result: Evaluation, plans: dict[str, SparsityPlan]) -> dict[str, Any]:
        """One object; with several plans a list of them, and the paired differences."""
        asked = {"model": self.model, "text": self.text, "weights": self.weights, "head": self.head, "held": self.hold}
        stated = {name: {"method": plan.method, "target": plan.target} for name, plan in plans.items()}
        if len(plans) < 2:
            place = {"plan": self.plan[0] if self.plan else None}
            return result.as_json(next(reversed(result.sparse), None)) | asked | place | next(iter(stated.values()), {})
        dense = result.as_json()
        rows, paired = [], []
        for name, place in zip(plans, self.plan, strict=True):
            own = {key: value for key, value in result.as_json(name).items() if key not in dense}
            rows.append({"name": name, "plan": place} | stated[name] | own)
        for one, other in itertools.combinations(reversed(plans), 2):
            gap = result.paired(one, other)
            error = gap.error if math.isfinite(gap.error) else None
            paired.append({"first": one, "second": other, "kl": gap.mean, "kl_error": error})
            paired[-1]["at_share_of"] = result.common_rival(one, other)
        return dense | asked | {"plans": rows, "paired": paired}

    def _print(self, result: Evaluation, plans: dict[str, SparsityPlan]) -> None:
        from wisparse_jax.report.tables import console, layer_table, paired_line, quality_table, share_table

        show = console()
        share = f"the last {self.sparse_prefill:.0%} of each window sparse"
        show.print(quality_table(result, f"{result.tokens} tokens of {self.text}, {share}"))
        if result.rivals:
            show.print(share_table(result))
        for name, plan in plans.items():
            found = result.sparse[name].sparsity.mean
            if abs(found - plan.target) > NEAR:
                asked = f"not the {plan.target:.0%} that it was made for: what a plan skips depends on the text"
                asked += "" if self.hold else "; generation holds it, as --hold does here"
                show.print(f"{name} skips {found:.1%}, {asked}", highlight=False)
        for one, other in itertools.combinations(reversed(plans), 2):
            show.print(paired_line(result, one, other), highlight=False)
        if len(plans) == 1:
            show.print(layer_table(result.sparse[next(iter(plans))]))

    def _run_tasks(self) -> None:
        from wisparse_jax.commands.lm_eval import run_harness

        given = {"pretrained": self.model, "plan": next(iter(self.plan), None), "weights": self.weights}
        given |= {"head": self.head, "sparse_prefill": self.sparse_prefill if self.plan else None}
        words = [f"{name}={value}" for name, value in given.items() if value is not None]
        run_harness(["run", "--model_args", *words, "--tasks", str(self.tasks)])
