"""From a model and text to plans: one target, several, or the sparsity that keeps a KL."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from kernels_pallas.formats import FORMATS
from wisparse_jax import __version__
from wisparse_jax.arguments import check_seed
from wisparse_jax.calibration.dense import Calibration, Tokens
from wisparse_jax.calibration.sparse_run import sparse_thresholds
from wisparse_jax.calibration.variety import check_variety
from wisparse_jax.errors import PlanError, WisparseError
from wisparse_jax.models.fingerprint import model_fingerprint
from wisparse_jax.models.model import Model
from wisparse_jax.models.tokens import token_windows
from wisparse_jax.search.judge import FEWEST_WINDOWS, held_out_windows
from wisparse_jax.search.methods import DEFAULT, PLANES, Choice, Method, get_method
from wisparse_jax.search.methods import resolve as resolve
from wisparse_jax.search.problem import Table
from wisparse_jax.search.search import Search
from wisparse_jax.search.settings import SearchSettings
from wisparse_jax.search.stages import Planes
from wisparse_jax.search.state import Place, SearchState, identity_of
from wisparse_jax.sparsity.plan import SparsityPlan

STEP = 0.005  # of the sparsity that keeps a KL
GUESSES = 4  # plans whose sparsity is told from the KL of those before; then halves, for curves of any shape


def calibrate(
    model: Model,
    tokens: Tokens,
    sparsity: float = 0.5,
    method: Choice = DEFAULT,
    seed: int = 0,
    settings: SearchSettings | None = None,
    progress: bool = False,
    text: str = "tokens given by the caller",
    state: str | Path | Place | None = None,
    bits: float | None = None,
    kinds: Sequence[str] | None = None,
) -> SparsityPlan:
    """Search a plan for the model on calibration text.

    Args:
        model: the dense model.
        tokens: windows of calibration text, token ids; the last of them are held out.
        sparsity: the share of channels to skip, averaged over all block linears weighted by parameter count.
        method: one of `METHODS`, by name or as it is; or an allocator, for the default method with it.
        seed: of the samples and searches.
        settings: the search's budget; None for the defaults.
        progress: show a progress bar on standard error.
        text: where the tokens come from, for the plan's record.
        state: folder to keep what is found in, so that a killed search goes on to the same plan; it stays, for the
            caller to remove (`remove_state`) once the plan is saved.
        bits: in place of `sparsity`, the bits to read of a weight in planes, scales counted; the default method is
            "planes" then. `SparsityPlan.at_bits` gives the plan of any others.
        kinds: of text, one a window, by any names: a part of the method has to help each kind that weighs a tenth of
            the held-out windows.

    Warns:
        UserWarning: the text is degenerate, see `calibration.check_variety`: the plan will fit no other.

    Raises:
        WisparseError: unknown method, a sparsity that the settings do not allow, or tokens the model cannot read.
    """
    if bits is not None:
        method = PLANES if method == DEFAULT else method
        sparsity = sparsity_of_bits(bits, method)
    return calibrate_targets(model, tokens, [sparsity], method, seed, settings, progress, text, state, kinds)[0]


def sparsity_of_bits(bits: float, method: Choice) -> float:
    """The share of the stored bits that is not read when so many of a weight's are, scales counted.

    Raises:
        WisparseError: bits beyond those that are stored, or a method without planes.
    """
    planes = [stage for stage in get_method(method).stages if isinstance(stage, Planes)]
    if not planes:
        raise WisparseError(f"bits = {bits}: expected a method for weights in planes, such as planes, found {method}")
    stored = sum(FORMATS[planes[0].format].plane_bits)
    if not 0 < bits <= stored:
        raise WisparseError(f"bits = {bits}: expected a number above 0, at most {stored:g}")
    return 1 - bits / stored


def calibrate_targets(
    model: Model,
    tokens: Tokens,
    sparsities: Sequence[float],
    method: Choice = DEFAULT,
    seed: int = 0,
    settings: SearchSettings | None = None,
    progress: bool = False,
    text: str = "tokens given by the caller",
    state: str | Path | Place | None = None,
    kinds: Sequence[str] | None = None,
) -> list[SparsityPlan]:
    """A plan for every target, in one run that shares what does not depend on it; arguments as in `calibrate`."""
    settings = SearchSettings() if settings is None else settings
    for sparsity in sparsities:
        check_sparsity(sparsity, settings)
    sparsities = [sparsity + 0.0 for sparsity in sparsities]  # of -0.0 it makes 0.0
    search = _begin(model, tokens, method, seed, settings, progress, text, state, list(sparsities), kinds)
    plans = [search.plan(sparsity) for sparsity in sparsities]
    search.close()
    return plans


def calibrate_to_kl(
    model: Model,
    tokens: Tokens,
    max_kl: float,
    method: Choice = DEFAULT,
    seed: int = 0,
    settings: SearchSettings | None = None,
    progress: bool = False,
    text: str = "tokens given by the caller",
    state: str | Path | Place | None = None,
    kinds: Sequence[str] | None = None,
) -> SparsityPlan:
    """The plan of the largest sparsity, to 0.005, whose KL on held-out windows is at most `max_kl`, nats per token.

    Found by bisection on plans without what is searched or trained for one target, such as exponents and biases; then
    on plans with it, from there on. Arguments as in `calibrate`.

    Raises:
        WisparseError: as `calibrate`; also too few windows to hold any out.
    """
    settings = SearchSettings() if settings is None else settings
    if not 0 < max_kl < float("inf"):
        raise WisparseError(f"max-kl = {max_kl}: expected a positive number of nats per token")
    check_amount(len(tokens), settings, held_out=True)
    search = _begin(model, tokens, method, seed, settings, progress, text, state, [f"KL {max_kl}"], kinds)
    highest = int(settings.max_sparsity / STEP + 1e-9)
    rough, near = {0: 0.0}, (0, highest + 1)  # KL by steps of sparsity; those that keep the bound, and not
    while near[1] - near[0] > 1:
        middle = sum(near) // 2
        rough[middle] = search.held_out_kl(_steps(middle))
        near = (middle, near[1]) if rough[middle] <= max_kl else (near[0], middle)
    plans: dict[int, SparsityPlan] = {}
    low, high, guess = 0, highest + 1, near[0]
    while low + 1 < high:
        guess = min(max(guess, low + 1), high - 1) if len(plans) < GUESSES else (low + high) // 2
        plans[guess] = search.plan(_steps(guess))
        kl = plans[guess].held_out["plan"]["kl"]
        low, high = (guess, high) if kl <= max_kl else (low, guess)
        guess += _steps_between(kl, max_kl, rough, near)
    plan = plans[low] if low else search.plan(0.0)
    search.close()
    return plan


def _steps_between(kl: float, wanted: float, rough: dict[int, float], near: tuple[int, int]) -> int:
    """About how many steps of sparsity lie between two KLs, at least one; ln KL rises as it does around the bound."""
    low, high = max(1, near[0] - 4), min(near[1] + 4, max(rough))
    known = sorted(step for step, value in rough.items() if low <= step <= high and 0 < value < math.inf)
    slope = 0.05  # of ln KL, a step
    if len(known) > 1:
        slope = max(0.01, (math.log(rough[known[-1]]) - math.log(rough[known[0]])) / (known[-1] - known[0]))
    if not 0 < kl < math.inf:
        return max(rough) if kl <= 0 else -max(rough)
    steps = (math.log(wanted) - math.log(kl)) / slope
    return max(1, math.floor(steps)) if steps >= 0 else min(-1, math.floor(steps))


def _steps(count: int) -> float:
    """The sparsity of a number of steps."""
    return round(count * STEP, 6)


def _begin(
    model: Model,
    tokens: Tokens,
    method: Choice,
    seed: int,
    settings: SearchSettings,
    progress: bool,
    text: str,
    state: str | Path | Place | None,
    targets: list[Any],
    kinds: Sequence[str] | None,
) -> Search:
    """Check everything that can be refused, and run what all targets share; `targets` tell a kept search's state."""
    seed = check_seed(seed)
    chosen = resolve(method, settings)
    windows = token_windows(model.config, tokens)
    check_searchable(model, chosen)
    check_amount(len(windows), settings, windows.shape[1])
    kinds = () if kinds is None else tuple(kinds)
    if kinds and len(kinds) != len(windows):
        raise WisparseError(f"kinds: expected one for each of {len(windows)} windows, found {len(kinds)}")
    try:
        check_variety(windows, model.config.vocab_size)
    except WisparseError as error:
        warnings.warn(f"calibration: {error}", stacklevel=4)
    identity = identity_of(
        model_fingerprint(model), str(model.dtype), windows, targets, repr(chosen), seed, dataclasses.asdict(settings),
        kinds, __version__, [d.device_kind for d in jax.local_devices()],
    )  # fmt: skip
    kept = SearchState(Place.of(state), identity)
    return Search(model, windows, chosen, seed, settings, progress, text, kept, len(targets), kinds)


def check_searchable(model: Model, method: Method) -> None:
    """Refuse a model that no plan of the method can be searched for.

    Raises:
        WisparseError: folded into a basis, or what a stage of the method cannot work on.
    """
    if model.basis_digest is not None:
        raise WisparseError("expected the model as it was: this one is folded into the basis of a plan")
    for stage in method.stages:
        stage.check(model, method.name)


def check_amount(windows: int, settings: SearchSettings, length: int | None = None, held_out: bool = False) -> None:
    """Refuse a number of windows, or their length, that the settings leave too little of.

    Raises:
        WisparseError: fewer than two sparse positions in a window, or no window held out where that is needed.
    """
    if length is not None and (positions := settings.sparse_positions(length)) < 2:
        raise WisparseError(
            f"sparse_share = {settings.sparse_share}: leaves {positions} sparse position of windows of "
            f"{length} tokens, expected at least 2"
        )
    if held_out and not held_out_windows(windows, settings):
        raise WisparseError(
            f"max-kl needs held-out windows: expected at least {FEWEST_WINDOWS} windows and held_out_share above 0"
        )


def check_sparsity(sparsity: float, settings: SearchSettings) -> None:
    """Refuse a target that no budget can meet.

    Raises:
        WisparseError: not a number in [0, max_sparsity].
    """
    if not 0 <= sparsity <= settings.max_sparsity:
        hint = f"; did you mean {sparsity / 100:g}?" if 1 < sparsity <= 100 * settings.max_sparsity else ""
        raise WisparseError(f"sparsity = {sparsity}: expected a number from 0 to {settings.max_sparsity}{hint}")


def with_budgets(calibration: Calibration, plan: SparsityPlan, sparsities: Table) -> SparsityPlan:
    """The plan with other sparsities of its layers; thresholds are those that realise them on the calibration text.

    Args:
        calibration: the dense run, in the plan's basis; its gains are replaced by the plan's, where it has any.
        plan: gives the exponents, the gains and the biases.
        sparsities: of every layer; their mean becomes the target.

    Raises:
        PlanError: a dense run of another model or in another basis, or sparsities that are none.
    """
    wanted, found_in = (None if basis is None else basis.digest() for basis in (plan.basis, calibration.basis))
    if plan.fingerprint != calibration.fingerprint or wanted != found_in:
        raise PlanError(
            "the dense run is not of the plan's model in the plan's basis: run_dense(..., basis=plan.basis)"
        )
    if sparsities.shape != plan.sparsities.shape or not ((sparsities >= 0) & (sparsities <= 1)).all():
        raise PlanError(f"sparsities: expected {plan.sparsities.shape} numbers from 0 to 1")
    if plan.gains is not None:
        calibration = calibration.with_gains(plan.gains)
    thresholds, realised = sparse_thresholds(calibration, plan.exponents, sparsities, plan.biases)
    plan = dataclasses.replace(plan, sparsities=sparsities, thresholds=thresholds, realised=realised, held_out={})
    return dataclasses.replace(plan, target=plan.mean_sparsity)
