"""`wisparse benchmark`."""

from __future__ import annotations

import dataclasses
import json as json_format
import time
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from wisparse_jax.commands.options import Unset
from wisparse_jax.errors import WisparseError

if TYPE_CHECKING:
    from wisparse_jax.models.config import LlamaConfig
    from wisparse_jax.models.rules import Thresholds


CONTEXT = 512
SPARE = 8  # slots of the cache beside the context and the tokens of a run


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Time decoding, dense and sparse, in one run."""

    model: Positional[str]
    """A folder, a hub id, `demo`, or the name of a shape that gets random weights, such as llama-3.1-8b."""
    plan: Unset[str | None] = None
    """The plan of the sparse steps, a folder or a hub id; without one, every layer skips the share `--sparsity` of what
    it reads."""
    sparsity: Unset[tuple[float, ...]] = ()
    """Shares to skip without a plan (default 0.5)."""
    weights: tuple[Literal["stored", "int8", "int4"], ...] = ("stored",)
    """Kinds of block weights, one after the other."""
    head: tuple[Literal["stored", "int8"], ...] = ("stored",)
    """Kinds of heads, each with every kind of weights."""
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
        """Time and print."""
        import jax

        from wisparse_jax.benchmark import Options, benchmark
        from wisparse_jax.benchmark.table import report

        self._check()
        config, params, thresholds = self._model()
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
            self.sparsity or (0.5,), self.batch, context, self.weights, self.head, self.biases,
            self.implementation, self.tokens, self.repeats, self.profile,
        )  # fmt: skip
        runs = benchmark(config, params, options, thresholds)
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
        for share in self.sparsity:
            check_share(share, "sparsity")
        for name, values in (("batch", self.batch), ("context", self.context)):
            for value in values:
                check_count(value, name, least=1)
        for name, value in (("tokens", self.tokens), ("repeats", self.repeats), ("blocks", self.blocks)):
            if value is not None:
                check_count(value, name, least=1)

    def _model(self) -> tuple[LlamaConfig, dict[str, Any], Thresholds | None]:
        """The architecture, its weights, and a plan's thresholds; biases are among the weights."""
        import jax

        from wisparse_jax.benchmark.random_model import random_params
        from wisparse_jax.models.config import read_config
        from wisparse_jax.models.loading import load
        from wisparse_jax.models.rules import merge_biases, thresholds_of
        from wisparse_jax.presets import shapes
        from wisparse_jax.sparsity import SparsityPlan, load_sparse

        if (shape := shapes().get(self.model)) is not None:
            if self.plan is not None:
                raise WisparseError(f"plan: expected a model's, but {self.model} is a shape with random weights")
            config = read_config(shape)
            if self.blocks is not None:
                kept = self.blocks
                if kept > config.num_blocks:
                    raise WisparseError(f"blocks = {kept}: expected at most {config.num_blocks}, those of {self.model}")
                config = dataclasses.replace(config, num_blocks=kept, windows=config.windows[:kept])
            dtype = self.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
            return config, random_params(config, dtype), None
        if self.blocks is not None:
            raise WisparseError(f"blocks: expected for a shape only ({', '.join(shapes())}), not for a model")
        if self.plan is None:
            model = load(self.model, self.dtype)
            return model.config, model.params, None
        sparse = load_sparse(self.model, SparsityPlan.load(self.plan), self.dtype)
        return sparse.config, merge_biases(sparse.params, sparse.rules), thresholds_of(sparse.rules)
