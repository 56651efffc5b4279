"""One method's search on one text, stage by stage, each one's time and cost on record.

Dense run; basis; gains; exponents; then for every target budgets, training and thresholds. What does not depend on the
target is done once. Windows that are held out judge a plan at its end, and the stages that may over-fit: one that does
not improve their KL is dropped.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from wisparse_jax import __version__
from wisparse_jax.calibration.dense import Calibration, run_dense, run_dense_on
from wisparse_jax.calibration.gradients import gradient_gains
from wisparse_jax.calibration.settings import SearchSettings
from wisparse_jax.calibration.sparse_run import Biases, sparse_thresholds
from wisparse_jax.models.basis import Basis
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.llama import Llama
from wisparse_jax.search.allocators import get_allocator
from wisparse_jax.search.basis import measure_moments, refine_basis, start_basis
from wisparse_jax.search.exponents import search_exponents
from wisparse_jax.search.judge import Judge, baselines, held_out_windows, sparse_at
from wisparse_jax.search.losses import BlockLoss
from wisparse_jax.search.problem import BudgetProblem, Table
from wisparse_jax.search.progress import STARTS, Progress, stages, trains
from wisparse_jax.search.state import SearchState, Spent
from wisparse_jax.search.training import Trained, start_of, train
from wisparse_jax.sparsity.apply import SparseLlama, plan_rules
from wisparse_jax.sparsity.methods import Method
from wisparse_jax.sparsity.plan import SparsityPlan
from wisparse_jax.sparsity.score import ChannelGains

FEW_TOKENS = 2_048  # below it a search is warned about
# Of a window's positions, at its end, those that a basis is found on: all but the first few, which see little text.
BASIS_SHARE = 31 / 32


class Search:
    """One method's search on one text: what targets share when it is made, the rest in `plan`."""

    def __init__(
        self,
        model: Llama,
        windows: Int[np.ndarray, "windows length"],
        method: Method,
        seed: int,
        settings: SearchSettings,
        progress: bool,
        text: str,
        state: SearchState,
        targets: int,
    ):
        self.model, self.method, self.seed, self.settings, self.state = model, method, seed, settings, state
        count = len(windows)
        held = held_out_windows(count, settings)
        self.judge = Judge(model, windows[count - held :] if held else windows[:0], settings, seed)
        self.text, training = text, windows[: count - held]
        self.progress = Progress(
            method.name, stages(method, bool(self.judge), targets), progress, settings.compare_teal, state
        )
        self.history: dict[str, Any] = {}
        self._shared: dict[str, Any] = {}
        self.spent = Spent()
        self.problem: BudgetProblem | None = None
        with self.progress.stage("statistics"):
            plain = self.calibration = run_dense(model, training, settings, seed, text)
        zero = np.zeros((plain.config.num_blocks, len(LAYERS)))
        self.teal = BudgetProblem(plain, zero, settings, seed, self.progress.steps, state=state)
        if self.calibration.tokens.size < FEW_TOKENS:
            self._note(f"a search on {self.calibration.tokens.size} sparse positions may over-fit them")
        with self.progress.stage("held out"):
            self.held_out = self._plain_held_out = self.judge.run_dense(self.calibration)
        if method.basis != "none":
            self._try("basis", self._rotated(training), basis="none")
        # Whether the gains of the score are the plan's own, or the norms of the weights that it runs with.
        self._own_gains = method.gains != "norms" and self._try("gains", self._with_gradient_gains(), exponent=0.0)
        # What every target's record begins with.
        self._shared = self.history

    def _try(self, name: str, made: Calibration, **without: Any) -> bool:
        """Go on with what a stage made if it helps uniform sparsity on the held-out windows, or there are none."""
        with self.progress.stage("held out"):
            held_out = self.judge.run_dense(made)
        if self.held_out is not None and held_out is not None:
            with self.progress.stage("held out"):
                before = self.judge.uniform_divergence(self.held_out, 0.0)
                after = self.judge.uniform_divergence(held_out, 1.0 if name == "gains" else 0.0)
            self.history[f"{name}, held-out KL"] = [before, after]
            if not after < before:
                self._note(f"{name}: dropped, held-out KL {after:.4f} instead of {before:.4f}")
                self.method = dataclasses.replace(self.method, **without)
                return False
        self.calibration, self.held_out = made, held_out
        return True

    def _note(self, line: str) -> None:
        # Not the list that other targets' records hold.
        before = self.history.get("notes", self._shared.get("notes", []))
        self.history["notes"] = [*before, line]

    def _rotated(self, training: np.ndarray) -> Calibration:
        settings = self.settings

        def find() -> dict[str, np.ndarray]:
            with self.progress.stage("moments"):
                # The basis has many numbers and the text few tokens: those that run dense tell of it as well.
                wide = run_dense_on(
                    self.calibration, training, dataclasses.replace(settings, sparse_share=BASIS_SHARE), self.seed
                )
                moments = measure_moments(wide, settings.gradient_tokens, self.seed)
                del wide
                self.spent.tokens += 3 * settings.gradient_tokens
            with self.progress.stage("basis"):
                basis, losses = start_basis(moments), {}
                if self.method.basis == "refined":
                    steps = settings.absolute_steps, settings.skipped_steps, settings.heads_steps
                    basis, losses = refine_basis(
                        moments, basis, settings.basis_sparsity, steps, settings.basis_rate, self.seed,
                        self.progress.steps,
                    )  # fmt: skip
                curve = {f"loss {name}": np.asarray(pair) for name, pair in losses.items()}
                return {name: np.asarray(value) for name, value in basis._asdict().items()} | curve

        found = self.state.keep("basis", find, self.spent)
        self.progress.pass_by("moments", "basis")
        losses = {name: value.tolist() for name, value in found.items() if name.startswith("loss ")}
        self.history["basis"] = losses
        basis = Basis(jnp.asarray(found["stream"]), jnp.asarray(found["heads"]))
        with self.progress.stage("statistics"):
            return run_dense(self.model, training, settings, self.seed, self.text, basis)

    def _with_gradient_gains(self) -> Calibration:
        def find() -> dict[str, np.ndarray]:
            gains = gradient_gains(self.calibration, self.settings.gradient_tokens, self.seed)
            self.spent.tokens += 3 * self.settings.gradient_tokens
            return {f"{b}.{name}": np.asarray(row[name]) for b, row in enumerate(gains) for name in LAYERS}

        with self.progress.stage("gains"):
            found = self.state.keep("gains", find, self.spent)
        blocks = range(self.calibration.config.num_blocks)
        gains: list[ChannelGains] = [{name: jnp.asarray(found[f"{b}.{name}"]) for name in LAYERS} for b in blocks]
        return self.calibration.with_gains(gains)

    def plan(self, target: float) -> SparsityPlan:
        """The plan of one target."""
        self.history = {}  # what it says of other targets is not of this plan
        shape = (self.calibration.config.num_blocks, len(LAYERS))
        exponents = np.full(shape, self.method.exponent)
        uniform = np.full(shape, float(target))
        searched = self.method.search_exponents and target > 0
        if searched:
            found = self._exponents(f"exponents {target}", "exponents", exponents, uniform)
            exponents = self._better("exponents", target, (exponents, uniform), (found, uniform))[0]
        sparsities = self._budgets(target, exponents)
        if searched and (sparsities != target).any():
            found = self._exponents(f"final exponents {target}", "final exponents", exponents, sparsities)
            exponents = self._better("final exponents", target, (exponents, sparsities), (found, sparsities))[0]
        calibration, held_out, biases, own_gains = self.calibration, self.held_out, None, self._own_gains
        trained = self._trained(target, exponents, sparsities)
        if trained is not None:
            calibration, held_out, exponents, biases = trained
            own_gains = own_gains or self.method.gains == "trained"
        with self.progress.stage("thresholds"):
            thresholds = sparse_thresholds(calibration, exponents, sparsities, biases, held_out)
        made = SparsityPlan(
            method=self.method.name,
            target=float(target),
            exponents=exponents,
            sparsities=sparsities,
            thresholds=thresholds.taus,
            realised=thresholds.realised,
            layer_weights=calibration.config.layer_weights,
            fingerprint=calibration.fingerprint,
            seed=self.seed,
            basis=calibration.basis,
            gains=calibration.gains if own_gains else None,
            biases=biases,
            calibration={"model": self.model.name, **calibration.record, "held_out_windows": len(self.judge.windows)},
            settings=dataclasses.asdict(self.settings),
            version=__version__,
        )
        with self.progress.stage("comparison"):
            figures = self._report(made)
        return dataclasses.replace(
            made,
            held_out=figures | {"forward_tokens": round(self.spent.tokens)},
            timings={name: round(seconds, 3) for name, seconds in self.progress.timings.items()},
            history=copy.deepcopy(self._shared | self.history),
        )

    def held_out_divergence(self, target: float) -> float:
        """The KL of a target's plan without biases, on the held-out windows; 0 for a target of 0."""
        if target == 0:
            return 0.0
        exponents = np.full((self.calibration.config.num_blocks, len(LAYERS)), self.method.exponent)
        sparsities = self._budgets(target, exponents)
        return self.judge.divergence(sparse_at(self.calibration, exponents, sparsities, self.held_out))

    def close(self) -> None:
        """The search is over: its bar stays as it is."""
        self.progress.close()

    def _budgets(self, target: float, exponents: Table) -> Table:
        if target == 0:
            return np.zeros(exponents.shape)
        with self.progress.stage("budgets"):
            problem = self._problem(target, exponents)
            allocation = get_allocator(self.method.allocator)(problem)
            self.history[f"budgets {target:g}"] = allocation.history
        # What was found on the tokens of the search against what it started from, which for an evolution is TEAL's.
        if self.method.allocator not in STARTS:
            return allocation.sparsities
        start = get_allocator(STARTS[self.method.allocator])(problem).sparsities
        return self._better("budgets", target, (exponents, start), (exponents, allocation.sparsities))[1]

    def _problem(self, target: float, exponents: Table) -> BudgetProblem:
        """The problem of a target; what was computed for another one is shared where the exponents are the same."""
        if self.problem is None or not np.array_equal(self.problem.exponents, exponents):
            self.problem = BudgetProblem(
                self.calibration, exponents, self.settings, self.seed, self.progress.steps, self.spent, self.state
            )
        return self.problem.aim(target)

    def _exponents(self, key: str, name: str, start: Table, sparsities: Table) -> Table:
        settings = self.settings
        found = []
        with self.progress.stage(name):
            for b in self.progress.steps(range(len(start))):

                def find(b: int = b) -> dict[str, np.ndarray]:
                    loss = BlockLoss(self.calibration, b, settings.exponent_tokens, settings.chunk)
                    statistics = self.calibration.statistics[b]
                    best, curve = search_exponents(
                        loss, statistics, start[b], sparsities[b], settings.exponents, settings.exponent_passes
                    )
                    return {"exponents": best, "errors": np.asarray([curve[0], curve[-1]])}

                found.append(self.state.keep(f"{key} block {b}", find))
        self.history[key] = {"block_error_before_and_after": [row["errors"].tolist() for row in found]}
        return np.stack([row["exponents"] for row in found])

    def _better(self, name: str, target: float, old: tuple[Table, Table], new: tuple[Table, Table]) -> tuple:
        """The new exponents and sparsities if they lose less on the held-out windows, or there are none of these."""
        if not self.judge or all(np.array_equal(a, b) for a, b in zip(old, new, strict=True)):
            return new
        with self.progress.stage("held out"):
            before, after = (self._held_out_kl(*pair) for pair in (old, new))
        self.history[f"{name} {target:g}, held-out KL"] = [before, after]
        if after < before:
            return new
        self._note(f"{name} at {target:g}: dropped, held-out KL {after:.4f} instead of {before:.4f}")
        return old

    def _held_out_kl(self, exponents: Table, sparsities: Table) -> float:
        """At just these sparsities: the thresholds are those of the held-out windows, not of the plan."""
        assert self.held_out is not None
        return self.judge.divergence(sparse_at(self.held_out, exponents, sparsities))

    def _trained(
        self, target: float, exponents: Table, sparsities: Table
    ) -> tuple[Calibration, Calibration, Table, Biases | None] | None:
        """Both runs with the trained gains, the exponents these count with, and the biases, if that helps."""
        held_out, method, settings = self.held_out, self.method, self.settings
        if held_out is None or not (trains(method) and settings.training_steps and target > 0):
            return None
        rates = settings.gain_rate * (method.gains == "trained"), settings.bias_rate * method.biases

        def find() -> dict[str, np.ndarray]:
            start = start_of(self.calibration, exponents)
            made, curve = train(
                self.calibration, held_out, start, sparsities, settings.training_steps, settings.training_tokens,
                settings.training_every, rates, self.seed, self.progress.steps,
            )  # fmt: skip
            steps = min(settings.training_steps, (len(curve) - 1) * settings.training_every)
            self.spent.tokens += 3 * steps * min(self.calibration.tokens.size, settings.training_tokens)
            parts = made._asdict().items()
            named = {
                f"{part} {b}.{name}": np.asarray(row[name])
                for part, rows in parts for b, row in enumerate(rows) for name in LAYERS
            }  # fmt: skip
            return named | {"curve": np.asarray(curve)}

        with self.progress.stage("training"):
            found = self.state.keep(f"training {target:g}", find, self.spent)
        blocks = range(self.calibration.config.num_blocks)
        made = Trained(
            *([{name: jnp.asarray(found[f"{part} {b}.{name}"]) for name in LAYERS} for b in blocks]
              for part in Trained._fields)
        )  # fmt: skip
        curve = self.history[f"training {target:g}, held-out KL"] = found["curve"].tolist()
        if not min(curve) < curve[0]:
            self._note(f"training at {target:g}: dropped, held-out KL {curve[0]:.4f} was the least")
            return None
        biases = made.biases if method.biases else None
        if method.gains != "trained":
            return self.calibration, held_out, exponents, biases
        gains = [{name: jnp.exp(row[name]) for name in LAYERS} for row in made.log_gains]
        return self.calibration.with_gains(gains), held_out.with_gains(gains), np.ones_like(exponents), biases

    def _report(self, plan: SparsityPlan) -> dict[str, Any]:
        """Held-out figures of the plan beside those of simpler ones and of the dense model."""
        if not self.judge:
            return {}
        config, params = self.calibration.config, self.calibration.params
        sparse = SparseLlama(config, params, plan_rules(params, plan))
        return self.judge.report(sparse, baselines(self.teal, self._plain_held_out, plan.target))
