"""From a model and text to plans: the stages in order, each one's time and cost on record.

Dense run; basis; gains; exponents; then for every target budgets, thresholds and biases. What does not depend on the
target is done once. Windows that are held out judge a plan at its end, and the stages that may over-fit: one that does
not improve their KL is dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from wisparse_jax import __version__
from wisparse_jax.arguments import check_seed
from wisparse_jax.calibration.dense import Calibration, Tokens, run_dense, run_dense_on
from wisparse_jax.calibration.gradients import gradient_gains
from wisparse_jax.calibration.settings import SearchSettings
from wisparse_jax.calibration.sparse_run import Biases, Thresholds, sparse_thresholds
from wisparse_jax.errors import WisparseError
from wisparse_jax.evaluation import Evaluation, evaluate
from wisparse_jax.models.basis import Basis
from wisparse_jax.models.config import LAYERS
from wisparse_jax.models.fingerprint import model_fingerprint
from wisparse_jax.models.llama import Llama
from wisparse_jax.models.tokens import token_windows
from wisparse_jax.search.allocators import get_allocator
from wisparse_jax.search.basis import measure_moments, refine_basis, start_basis
from wisparse_jax.search.biases import train_biases
from wisparse_jax.search.exponents import search_exponents
from wisparse_jax.search.losses import BlockLoss
from wisparse_jax.search.problem import BudgetProblem, Table
from wisparse_jax.search.progress import Progress
from wisparse_jax.search.state import SearchState, Spent, identity_of
from wisparse_jax.sparsity.apply import SparseLlama, threshold_rules, with_biases
from wisparse_jax.sparsity.methods import DEFAULT, Method, get_method
from wisparse_jax.sparsity.plan import SparsityPlan
from wisparse_jax.sparsity.score import ChannelGains

# Fewer windows than this leave none to hold out.
FEWEST_WINDOWS = 4
FEW_TOKENS = 2_048  # below it a search is warned about
STEP = 0.005  # of the sparsity that keeps a KL


def calibrate(
    model: Llama,
    tokens: Tokens,
    sparsity: float = 0.5,
    method: str = DEFAULT,
    seed: int = 0,
    settings: SearchSettings | None = None,
    progress: bool = False,
    text: str = "tokens given by the caller",
    state: str | Path | None = None,
) -> SparsityPlan:
    """Search a plan for the model on calibration text.

    Args:
        model: the dense model.
        tokens: windows of calibration text, token ids; the last of them are held out.
        sparsity: the share of channels to skip, averaged over all block linears weighted by parameter count.
        method: one of `METHODS`.
        seed: of the samples and searches.
        settings: the search's budget; None for the defaults.
        progress: show a progress bar on standard error.
        text: where the tokens come from, for the plan's record.
        state: folder to keep what is found in, so that a killed search goes on; removed at the end.

    Raises:
        WisparseError: unknown method, a sparsity that the settings do not allow, or tokens the model cannot read.
    """
    return calibrate_targets(model, tokens, [sparsity], method, seed, settings, progress, text, state)[0]


def calibrate_targets(
    model: Llama,
    tokens: Tokens,
    sparsities: Sequence[float],
    method: str = DEFAULT,
    seed: int = 0,
    settings: SearchSettings | None = None,
    progress: bool = False,
    text: str = "tokens given by the caller",
    state: str | Path | None = None,
) -> list[SparsityPlan]:
    """A plan for every target, in one run that shares what does not depend on it; arguments as in `calibrate`."""
    settings = SearchSettings() if settings is None else settings
    for sparsity in sparsities:
        check_sparsity(sparsity, settings)
    search = _begin(model, tokens, method, seed, settings, progress, text, state, list(sparsities))
    plans = [search.plan(sparsity) for sparsity in sparsities]
    search.close()
    return plans


def calibrate_to_divergence(
    model: Llama,
    tokens: Tokens,
    max_kl: float,
    method: str = DEFAULT,
    seed: int = 0,
    settings: SearchSettings | None = None,
    progress: bool = False,
    text: str = "tokens given by the caller",
    state: str | Path | None = None,
) -> SparsityPlan:
    """The plan of the largest sparsity, to 0.005, whose KL on held-out windows is at most `max_kl`, nats per token.

    Found by bisection on plans without biases; biases are trained for the one that is found. Arguments as in
    `calibrate`.

    Raises:
        WisparseError: as `calibrate`; also too few windows to hold any out.
    """
    settings = SearchSettings() if settings is None else settings
    search = _begin(model, tokens, method, seed, settings, progress, text, state, [f"KL {max_kl}"])
    if not len(search.held_out_windows):
        raise WisparseError(
            f"max-kl needs held-out windows: expected at least {FEWEST_WINDOWS} windows and held_out_share above 0"
        )
    low, high = 0, round(settings.max_sparsity / STEP)  # in steps; low is known to keep the bound
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if search.held_out_divergence(middle * STEP) <= max_kl else (low, middle - 1)
    plan = search.plan(low * STEP)
    search.close()
    return plan


def _begin(
    model: Llama,
    tokens: Tokens,
    method: str,
    seed: int,
    settings: SearchSettings,
    progress: bool,
    text: str,
    state: str | Path | None,
    targets: list[Any],
) -> Search:
    check_seed(seed)
    chosen = resolve(method, settings)
    windows = token_windows(model.config, tokens)
    identity = identity_of(
        model_fingerprint(model), str(model.dtype), windows, targets, method, seed, dataclasses.asdict(settings),
        __version__, [d.device_kind for d in jax.local_devices()],
    )  # fmt: skip
    kept = SearchState(None if state is None else Path(state), identity)
    return Search(model, windows, chosen, seed, settings, progress, text, kept, len(targets))


def check_sparsity(sparsity: float, settings: SearchSettings) -> None:
    """Refuse a target that no budget can meet.

    Raises:
        WisparseError: not a number in [0, max_sparsity].
    """
    if not 0 <= sparsity <= settings.max_sparsity:
        hint = f"; did you mean {sparsity / 100:g}?" if 1 < sparsity <= 100 * settings.max_sparsity else ""
        raise WisparseError(f"sparsity = {sparsity}: expected a number from 0 to {settings.max_sparsity}{hint}")


def resolve(method: str, settings: SearchSettings) -> Method:
    """The method with the parts that the settings switch."""
    chosen = get_method(method)
    switched: dict[str, Any] = {
        name: getattr(settings, name) for name in ("basis", "gains", "allocator") if getattr(settings, name) != "method"
    }
    if settings.biases != "method":
        switched["biases"] = settings.biases == "on"
    return dataclasses.replace(
        chosen, search_exponents=chosen.search_exponents and settings.search_exponents, **switched
    )


def with_budgets(calibration: Calibration, plan: SparsityPlan, sparsities: Table) -> SparsityPlan:
    """The plan with other sparsities of its layers; thresholds are those that realise them on the calibration text.

    Args:
        calibration: the dense run, in the plan's basis; its gains are replaced by the plan's, where it has any.
        plan: gives the exponents, the gains and the biases.
        sparsities: of every layer; their mean becomes the target.
    """
    if plan.gains is not None:
        calibration = calibration.with_gains(plan.gains)
    found = sparse_thresholds(calibration, plan.exponents, sparsities, plan.biases)
    made = dataclasses.replace(plan, sparsities=sparsities, thresholds=found.taus, realised=found.realised, held_out={})
    return dataclasses.replace(made, target=made.mean_sparsity)


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
        held = round(count * settings.held_out_share) if count >= FEWEST_WINDOWS else 0
        self.held_out_windows = windows[count - held :] if held else windows[:0]
        self.text, training = text, windows[: count - held]
        self.progress = Progress(method.name, self._stages(targets), progress)
        self.history: dict[str, Any] = {}
        self.spent = Spent()
        self.problem: BudgetProblem | None = None
        with self.progress.stage("statistics"):
            self.plain = self.calibration = run_dense(model, training, settings, seed, text)
        if self.calibration.tokens.size < FEW_TOKENS:
            self._note(f"a search on {self.calibration.tokens.size} sparse positions may over-fit them")
        self.held_out = self._on_held_out(self.calibration)
        if method.basis != "none":
            self._try("basis", self._rotated(training), basis="none")
        if method.gains == "gradients":
            self._try("gains", self._with_gradient_gains(), gains="norms", exponent=0.0)

    def _on_held_out(self, calibration: Calibration) -> Calibration | None:
        """The same model's dense run on the windows that are held out."""
        if not len(self.held_out_windows):
            return None
        with self.progress.stage("held out"):
            return run_dense_on(calibration, self.held_out_windows, self.settings, self.seed)

    def _try(self, name: str, made: Calibration, **without: Any) -> None:
        """Go on with what a stage made if it helps uniform sparsity on the held-out windows, or there are none."""
        held_out = self._on_held_out(made)
        if self.held_out is not None and held_out is not None:
            with self.progress.stage("held out"):
                before = self._uniform_divergence(self.held_out, "norms")
                after = self._uniform_divergence(held_out, "gradients" if name == "gains" else "norms")
            self.history[f"{name}, held-out KL"] = [before, after]
            if not after < before:
                self._note(f"{name}: dropped, held-out KL {after:.4f} instead of {before:.4f}")
                self.method = dataclasses.replace(self.method, **without)
                return
        self.calibration, self.held_out = made, held_out

    def _uniform_divergence(self, held_out: Calibration, gains: str) -> float:
        """The held-out KL of uniform sparsity; the windows' own scores set the thresholds."""
        shape = (held_out.config.num_blocks, len(LAYERS))
        exponents = np.full(shape, 1.0 if gains == "gradients" else 0.0)
        taus = sparse_thresholds(held_out, exponents, np.full(shape, self.settings.basis_sparsity)).taus
        rules = threshold_rules(held_out.gains, exponents, taus)
        return self._divergence(SparseLlama(held_out.config, held_out.params, rules))

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
        self.history.setdefault("notes", []).append(line)

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

    def plan(self, target: float) -> SparsityPlan:
        """The plan of one target."""
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
            calibration={**calibration.record, "held_out_windows": len(self.held_out_windows)},
            settings=dataclasses.asdict(self.settings),
            version=__version__,
        )
        with self.progress.stage("held out"):
            held_out = self._report(made, exponents, target)
        return dataclasses.replace(
            made,
            held_out=held_out | {"forward_tokens": round(self.spent.tokens)},
            timings={name: round(seconds, 3) for name, seconds in self.progress.timings.items()},
            history=dict(self.history),
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
        if not len(self.held_out_windows) or all(np.array_equal(a, b) for a, b in zip(old, new, strict=True)):
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
        return self._divergence(self._sparse(threshold_rules(self.calibration.gains, exponents, found.taus)))

    def _divergence(self, sparse: SparseLlama) -> float:
        return self._evaluate({"plan": sparse}).sparse["plan"].divergence.mean

    def _sparse(self, rules: Any) -> SparseLlama:
        return SparseLlama(self.calibration.config, self.calibration.params, rules)

    def _evaluate(self, plans: dict[str, SparseLlama]) -> Evaluation:
        return evaluate(self.model, self.held_out_windows, plans, self.settings.sparse_share)

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
            self.spent.tokens += 3 * (len(curve) - 1) * settings.bias_every * 1024
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
            scores = self._evaluate(pair).sparse
        before, after = (scores[name].divergence.mean for name in ("plain", "biased"))
        if after < before:
            return biased, biases
        self._note(f"biases at {target:g}: dropped, held-out KL {after:.4f} instead of {before:.4f}")
        return plain, None

    def _report(self, plan: SparsityPlan, exponents: Table, target: float) -> dict[str, Any]:
        """Held-out KL and perplexity of the plan beside uniform sparsity and the dense model."""
        if not len(self.held_out_windows):
            return {}
        rules = threshold_rules(self.calibration.gains, exponents, plan.thresholds)
        compared = {"plan": self._sparse(rules if plan.biases is None else with_biases(rules, plan.biases))}
        compared |= self.baselines(target)
        result = self._evaluate(compared)
        out: dict[str, Any] = {"windows": len(self.held_out_windows), "dense_perplexity": result.dense.perplexity.mean}
        for name, score in result.sparse.items():
            out[name] = {
                "kl": score.divergence.mean,
                "perplexity": score.perplexity.mean,
                "sparsity": score.sparsity.mean,
            }
        return out

    def baselines(self, target: float) -> dict[str, SparseLlama]:
        """Uniform sparsity and, if the settings say so, TEAL's, by magnitude in the basis that the model has."""
        plain = self.plain
        shape = (plain.config.num_blocks, len(LAYERS))
        zero = np.zeros(shape)
        budgets = {"uniform": np.full(shape, float(target))}
        if self.settings.compare_teal and target > 0:
            problem = BudgetProblem(plain, zero, self.settings, self.seed, state=self.state)
            budgets["teal"] = get_allocator("greedy")(problem.aim(target)).sparsities
        return {
            name: SparseLlama(
                plain.config, plain.params, threshold_rules(plain.gains, zero, sparse_thresholds(plain, zero, p).taus)
            )
            for name, p in budgets.items()
        }
