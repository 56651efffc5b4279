"""One method's search on one text, stage by stage, each one's time and cost on record.

Dense run; basis; gains; exponents; then for every target budgets, thresholds and biases. What does not depend on the
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
from wisparse_jax.calibration.dense import Calibration, run_dense
from wisparse_jax.calibration.gradients import gradient_gains
from wisparse_jax.calibration.settings import SearchSettings
from wisparse_jax.calibration.sparse_run import Biases, Thresholds, sparse_thresholds
from wisparse_jax.models.basis import Basis
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.llama import Llama
from wisparse_jax.search.allocators import get_allocator
from wisparse_jax.search.basis import measure_moments, refine_basis, start_basis
from wisparse_jax.search.biases import TOKENS_A_STEP, train_biases
from wisparse_jax.search.exponents import search_exponents
from wisparse_jax.search.judge import Judge, baselines, held_out_windows
from wisparse_jax.search.losses import BlockLoss
from wisparse_jax.search.problem import BudgetProblem, Table
from wisparse_jax.search.progress import Progress
from wisparse_jax.search.state import SearchState, Spent
from wisparse_jax.sparsity.apply import SparseLlama, threshold_rules, with_biases
from wisparse_jax.sparsity.methods import Method
from wisparse_jax.sparsity.plan import SparsityPlan
from wisparse_jax.sparsity.score import ChannelGains

FEW_TOKENS = 2_048  # below it a search is warned about


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
        self.progress = Progress(method.name, self._stages(targets), progress)
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
            self.held_out = self.judge.run_dense(self.calibration)
        if method.basis != "none":
            self._try("basis", self._rotated(training), basis="none")
        if method.gains == "gradients":
            self._try("gains", self._with_gradient_gains(), gains="norms", exponent=0.0)
        # What every target's record begins with.
        self._shared = self.history

    def _try(self, name: str, made: Calibration, **without: Any) -> None:
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
                return
        self.calibration, self.held_out = made, held_out

    def _set_thresholds(self, exponents: Table, sparsities: Table, biases: Biases | None = None) -> Thresholds:
        """Thresholds that realise the sparsities.

        A basis fits the text that it was found on: there more channels are small than on other text. So where there is
        one, the thresholds are set on the windows that were held out.
        """
        other = self.held_out if self.method.basis != "none" else None
        return sparse_thresholds(self.calibration if other is None else other, exponents, sparsities, biases)

    def _stages(self, targets: int) -> list[str]:
        method = self.method
        once = ["statistics"] + ["moments", "basis", "statistics"] * (method.basis != "none")
        once += ["gains"] * (method.gains == "gradients")
        each = ["budgets", "thresholds", "held out"] + ["biases", "thresholds"] * method.biases
        return once + (each + ["exponents", "final exponents"] * method.search_exponents) * targets

    def _note(self, line: str) -> None:
        # Not the list that other targets' records hold.
        before = self.history.get("notes", self._shared.get("notes", []))
        self.history["notes"] = [*before, line]

    def _rotated(self, training: np.ndarray) -> Calibration:
        settings = self.settings

        def find() -> dict[str, np.ndarray]:
            with self.progress.stage("moments"):
                moments = measure_moments(self.calibration, settings.gradient_tokens, self.seed)
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

    def forget_targets(self) -> None:
        """What the record says of targets so far is not of the next plan."""
        self.history = {}

    def plan(self, target: float) -> SparsityPlan:
        """The plan of one target."""
        self.forget_targets()
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
        thresholds, biases = self._thresholds(target, exponents, sparsities)
        calibration = self.calibration
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
            gains=calibration.gains if self.method.gains == "gradients" else None,
            biases=biases,
            calibration={"model": self.model.name, **calibration.record, "held_out_windows": len(self.judge.windows)},
            settings=dataclasses.asdict(self.settings),
            version=__version__,
        )
        with self.progress.stage("held out"):
            held_out = self._report(made)
        return dataclasses.replace(
            made,
            held_out=held_out | {"forward_tokens": round(self.spent.tokens)},
            timings={name: round(seconds, 3) for name, seconds in self.progress.timings.items()},
            history=copy.deepcopy(self._shared | self.history),
        )

    def held_out_divergence(self, target: float) -> float:
        """The KL of a target's plan without biases, on the held-out windows; 0 for a target of 0."""
        if target == 0:
            return 0.0
        exponents = np.full((self.calibration.config.num_blocks, len(LAYERS)), self.method.exponent)
        return self._held_out_kl(exponents, self._budgets(target, exponents))

    def close(self) -> None:
        """The search is over: its bar stays as it is, its state goes."""
        self.progress.close()
        self.state.finish()

    def _budgets(self, target: float, exponents: Table) -> Table:
        if target == 0:
            return np.zeros(exponents.shape)
        with self.progress.stage("budgets"):
            problem = self._problem(target, exponents)
            allocation = get_allocator(self.method.allocator)(problem)
            self.history[f"budgets {target:g}"] = allocation.history
        # What was found on the tokens of the search against what it started from, which for an evolution is TEAL's.
        starts = {"evolution": "greedy", "second-order": "uniform"}
        if self.method.allocator not in starts:
            return allocation.sparsities
        start = get_allocator(starts[self.method.allocator])(problem).sparsities
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
        found = self._set_thresholds(exponents, sparsities)
        return self.judge.divergence(self._sparse(threshold_rules(self.calibration.gains, exponents, found.taus)))

    def _sparse(self, rules: Any) -> SparseLlama:
        return SparseLlama(self.calibration.config, self.calibration.params, rules)

    def _thresholds(self, target: float, exponents: Table, sparsities: Table) -> tuple[Thresholds, Biases | None]:
        calibration, settings = self.calibration, self.settings
        with self.progress.stage("thresholds"):
            plain = self._set_thresholds(exponents, sparsities)
        held_out = self.held_out
        if held_out is None or not (self.method.biases and settings.bias_steps and target > 0):
            return plain, None
        rules = threshold_rules(calibration.gains, exponents, plain.taus)

        def find() -> dict[str, np.ndarray]:
            biases, curve = train_biases(
                calibration, held_out, rules, settings.bias_steps, settings.bias_every, settings.bias_rate,
                self.seed, self.progress.steps,
            )  # fmt: skip
            steps = min(settings.bias_steps, (len(curve) - 1) * settings.bias_every)
            self.spent.tokens += 3 * steps * min(calibration.tokens.size, TOKENS_A_STEP)
            named = {f"{b}.{name}": np.asarray(row[name]) for b, row in enumerate(biases) for name in LAYERS}
            return named | {"curve": np.asarray(curve)}

        with self.progress.stage("biases"):
            found = self.state.keep(f"biases {target:g}", find, self.spent)
        blocks = range(calibration.config.num_blocks)
        biases = [{name: jnp.asarray(found[f"{b}.{name}"]) for name in LAYERS} for b in blocks]
        self.history[f"biases {target:g}, held-out KL"] = found["curve"].tolist()
        with self.progress.stage("thresholds"):
            # With the biases other activations come: the thresholds are set anew.
            biased = self._set_thresholds(exponents, sparsities, biases)
        pair = {
            "plain": self._sparse(rules),
            "biased": self._sparse(with_biases(threshold_rules(calibration.gains, exponents, biased.taus), biases)),
        }
        with self.progress.stage("held out"):
            scores = self.judge.evaluate(pair).sparse
        before, after = (scores[name].divergence.mean for name in ("plain", "biased"))
        if after < before:
            return biased, biases
        self._note(f"biases at {target:g}: dropped, held-out KL {after:.4f} instead of {before:.4f}")
        return plain, None

    def _report(self, plan: SparsityPlan) -> dict[str, Any]:
        """Held-out figures of the plan beside those of simpler ones and of the dense model."""
        if not self.judge:
            return {}
        rules = threshold_rules(self.calibration.gains, plan.exponents, plan.thresholds)
        sparse = self._sparse(rules if plan.biases is None else with_biases(rules, plan.biases))
        others = baselines(self.teal, plan.target)
        return self.judge.report(sparse, others)
