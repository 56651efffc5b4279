"""`wisparse benchmark`."""

from __future__ import annotations

import dataclasses
import json as json_format
import os
import time
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from wisparse_jax.commands.options import Unset
from wisparse_jax.errors import WisparseError

if TYPE_CHECKING:
    import numpy as np

    from wisparse_jax.models.config import LlamaConfig
    from wisparse_jax.models.rules import Thresholds
    from wisparse_jax.sparsity import SparsityPlan


CONTEXT = 512
SPARE = 8  # slots of the cache beside the context and the tokens of a run


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Time decoding, dense and sparse, in one run."""

    model: Positional[str]
    """A folder, a hub id, `demo`, or the name of a shape that gets random weights, such as llama-3.1-8b."""
    plan: Unset[str | None] = None
    """The plan of the sparse steps, a folder or a hub id; without one, every layer skips the share `--sparsity` of what
    it reads. A shape takes the shares of another model's plan, block by block at the same relative depth."""
    bits: Unset[float | None] = None
    """Of a plan for planes: the bits to read of a weight, scales counted, in place of those that it was made at."""
    sparsity: Unset[tuple[float, ...]] = ()
    """Shares to skip without a plan (default 0.5)."""
    weights: tuple[str, ...] = ("stored",)
    """Formats of block weights, one after the other, such as stored int8 int4."""
    head: tuple[str, ...] = ("stored",)
    """Formats of the head, each with every one of weights."""
    biases: Unset[bool] = False
    """Every kind of weights also with random biases in all layers: what trained ones cost. Not with a plan."""
    batch: tuple[int, ...] = (1,)
    """Sequences at once."""
    context: Unset[tuple[int, ...]] = ()
    """Tokens in the cache when the clock starts; by default 512, or what the model's context leaves."""
    tokens: int = 96
    """Tokens of a run."""
    repeats: int = 5
    """Runs, of which the median counts."""
    dtype: Unset[str | None] = None
    """float32, bfloat16 or float16; by default bfloat16 on a GPU or TPU, float32 on a CPU."""
    implementation: Unset[tuple[Literal["triton", "mosaic", "xla"], ...]] = ()
    """Of the sparse steps; by default the fastest that runs."""
    blocks: Unset[int | None] = None
    """Fewer blocks than a shape has, for a quick look."""
    profile: bool = True
    """Whether to tell where the time goes, on a GPU."""
    json: Unset[bool] = False
    """Print one JSON object and nothing else."""

    def run(self) -> None:
        """Time the decode steps and print the table."""
        import jax

        from wisparse_jax.benchmark import Options, benchmark
        from wisparse_jax.benchmark.table import report

        self._check()
        plan = self._plan()
        config, params, thresholds, shares = self._model(plan)
        most = config.context - self.tokens - SPARE
        context = self.context or (min(CONTEXT, most),)
        if max(context) > most or most < 1:
            raise WisparseError(
                f"context = {max(context)}: expected at most {most}, as the model's context is {config.context} and a "
                f"run writes {self.tokens} tokens"
                if most > 0
                else f"tokens = {self.tokens}: expected below {config.context - SPARE}, the model's context"
            )
        options = Options(
            self.sparsity or (0.5,), self.batch, context, self._weights(plan), self.head, self.biases,
            self.implementation, self.tokens, self.repeats, self.profile,
        )  # fmt: skip
        runs = benchmark(config, params, options, thresholds, shares)
        device, day, dtype = jax.devices()[0].device_kind, time.strftime("%Y-%m-%d"), params["embed"].dtype.name
        if self.json:
            print(json_format.dumps({"device": device, "jax": jax.__version__, "date": day, "runs": runs}))
        else:
            conditions = f"{self.model}, {dtype}, {device}, jax {jax.__version__}, {day}"
            print(report(f"{conditions}; median of {self.repeats} runs of {self.tokens} tokens", runs))

    def _check(self) -> None:
        from kernels_pallas.implementation import choose
        from wisparse_jax.arguments import check_count, check_share
        from wisparse_jax.models.loading import check_kinds

        for option, found in (("--sparsity", self.sparsity), ("--biases, which a plan has of its own", self.biases)):
            if self.plan is not None and found:
                raise WisparseError(f"expected either --plan or {option}, found both")
        for named in self.implementation:
            try:
                choose(named, offered=("triton", "mosaic", "xla"))
            except ValueError as error:
                raise WisparseError(str(error)) from None
        check_kinds(self.dtype)
        for weights in self.weights:
            check_kinds(weights=None if weights == "stored" else weights)
        for head in self.head:
            check_kinds(head=None if head == "stored" else head)
        for share in self.sparsity:
            check_share(share, "sparsity")
        for name, values in (("batch", self.batch), ("context", self.context)):
            for value in values:
                check_count(value, name, least=1)
        for name, value in (("tokens", self.tokens), ("repeats", self.repeats), ("blocks", self.blocks)):
            if value is not None:
                check_count(value, name, least=1)

    def _plan(self) -> SparsityPlan | None:
        """The plan of the sparse steps."""
        from wisparse_jax.commands.plans import at_bits
        from wisparse_jax.sparsity import SparsityPlan

        return at_bits(None if self.plan is None else SparsityPlan.load(self.plan), self.bits)

    def _weights(self, plan: SparsityPlan | None) -> tuple[str, ...]:
        """The formats that are timed; of a plan for planes its own, which a model has when it is loaded."""
        if plan is None or plan.planes is None:
            return self.weights
        if self.weights not in (("stored",), (plan.planes.format,)):
            raise WisparseError(f"weights = {' '.join(self.weights)}: the plan is for {plan.planes.format} weights")
        return (plan.planes.format,) if self._is_shape() else ("stored",)

    def _is_shape(self) -> bool:
        from wisparse_jax.presets import shapes

        return self.model in shapes()

    def _model(
        self, plan: SparsityPlan | None
    ) -> tuple[LlamaConfig, dict[str, Any], Thresholds | None, np.ndarray | None]:
        """The architecture, its weights, and a plan's thresholds, or for a shape its shares.

        Biases are among the weights.
        """
        import jax

        from wisparse_jax.benchmark.random_model import random_params, spread_shares
        from wisparse_jax.files import expanded
        from wisparse_jax.models.config import read_config
        from wisparse_jax.models.hub import DEMO, spells_repository
        from wisparse_jax.models.rules import merge_biases, thresholds_of
        from wisparse_jax.presets import shapes
        from wisparse_jax.sparsity import load

        if (shape := shapes().get(self.model)) is not None:
            config = read_config(shape)
            if self.blocks is not None:
                kept = self.blocks
                if kept > config.num_blocks:
                    raise WisparseError(f"blocks = {kept}: expected at most {config.num_blocks}, those of {self.model}")
                config = dataclasses.replace(config, num_blocks=kept, windows=config.windows[:kept])
            dtype = self.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
            return config, random_params(config, dtype), None, plan and spread_shares(plan, config.num_blocks)
        if not (self.model == DEMO or os.path.exists(expanded(self.model)) or spells_repository(self.model)):
            known = ", ".join(shapes())
            raise WisparseError(
                f"{self.model!r}: no such folder or shape: expected a model as for other commands, or one of {known}"
            )
        if self.blocks is not None:
            raise WisparseError(f"blocks: expected for a shape only ({', '.join(shapes())}), not for a model")
        model = load(self.model, self.dtype, plan=plan)
        if plan is None or model.rules is None:
            return model.config, model.params, None, None
        return model.config, merge_biases(model.params, model.rules), thresholds_of(model.rules), None
