"""`wisparse calibrate`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from wisparse_jax.commands.devices import OnDevices
from wisparse_jax.commands.options import Unset
from wisparse_jax.errors import PlanError, WisparseError

if TYPE_CHECKING:
    from wisparse_jax.sparsity import SparsityPlan


@dataclasses.dataclass(frozen=True)
class Calibrate(OnDevices):
    """Search a sparsity plan for a model."""

    model: Positional[str]
    """A folder, a hub id, or `demo`."""
    out: Path
    """Folder to write the plan to; it must not exist. With several sparsities, OUT-0.3, OUT-0.4 and so on."""
    sparsity: Unset[tuple[float, ...]] = ()
    """Share of the channels to skip, averaged over all block linears weighted by parameter count (default 0.5);
    several share the stages that do not depend on it."""
    bits: Unset[float | None] = None
    """Instead of a sparsity: the bits to read of a weight in planes, scales counted; the method is `planes` then. The
    plan serves every other number too: `--bits` of generate, chat and evaluate."""
    max_kl: Unset[float | None] = None
    """Instead of a sparsity: the largest one whose KL(dense || sparse) on held-out windows stays below this."""
    method: str = "wisparse-plus"
    """wisparse-plus, planes, grinqh, wisparse, wisparse-paper, teal, wina or uniform; `wisparse methods` says what
    each is made of."""
    text: tuple[str, ...] = ("self",)
    """Calibration text: UTF-8 files, and `self` for text that the dense model samples, of many kinds. Several have
    equal shares: a plan holds best on the kinds of text that it was calibrated on."""
    tokens: Unset[int | None] = None
    """Tokens of calibration text; by default those of the configuration."""
    seed: int = 0
    """Seed of the sampled text, the statistics and the searches."""
    config: Unset[str | None] = None
    """The search's settings: quick, default, thorough or paper (`wisparse presets`), or a YAML file; by default the
    preset that fits the model and the device."""

    def run(self) -> None:
        """Search and save the plan."""
        import jax

        from wisparse_jax.arguments import check_count, check_seed
        from wisparse_jax.commands.settings import settings_for
        from wisparse_jax.commands.texts import Texts
        from wisparse_jax.files import check_new_folder
        from wisparse_jax.interruption import goes_on_from
        from wisparse_jax.models import hub
        from wisparse_jax.models.loading import load, read_model_config
        from wisparse_jax.models.mesh import make_mesh
        from wisparse_jax.processes import is_first
        from wisparse_jax.report.tables import console, plan_table
        from wisparse_jax.search import calibrate_targets, calibrate_to_kl
        from wisparse_jax.search.cost import forecast
        from wisparse_jax.search.methods import DEFAULT, PLANES
        from wisparse_jax.search.pipeline import (
            check_amount,
            check_searchable,
            check_sparsity,
            resolve,
            sparsity_of_bits,
        )
        from wisparse_jax.search.state import Place, check_unused, is_begun, kept, remove_state

        # Everything that can be refused is refused before any work is done.
        settings = settings_for(self.config, self.model)
        name = PLANES if self.bits is not None and self.method == DEFAULT else self.method
        method = resolve(name, settings)
        check_seed(self.seed)
        if not self.out.name:
            raise PlanError(f"{self.out}: cannot be written: expected the name of a new folder")
        places, sparsities = [self.out], self.sparsity or (0.5,)
        if self.bits is not None:
            if self.sparsity or self.max_kl is not None:
                raise WisparseError("expected one of --bits, --sparsity and --max-kl, found several")
            sparsities = (sparsity_of_bits(self.bits, method),)
        if self.max_kl is not None:
            if self.sparsity:
                raise WisparseError("expected either --sparsity or --max-kl, found both")
            if not 0 < self.max_kl < float("inf"):
                raise WisparseError(f"max-kl = {self.max_kl}: expected a positive number of nats per token")
        else:
            if len({f"{sparsity:g}" for sparsity in sparsities}) < len(sparsities):
                raise WisparseError(
                    f"sparsity = {sparsities}: expected none twice, in the six digits of a folder's name"
                )
            for sparsity in sparsities:
                check_sparsity(sparsity, settings)
            if len(sparsities) > 1:
                places = [self.out.with_name(f"{self.out.name}-{sparsity:g}") for sparsity in sparsities]
        # What one process reads from a state and others compute would leave them waiting for each other.
        state = None if jax.process_count() > 1 else self.out.with_name(f".{self.out.name}.search")
        check_unused(state)
        resumed = is_begun(state)
        for place, sparsity in zip(places, sparsities, strict=True):
            # A run of the same command that was killed may have written some of its plans.
            earlier = _written(place) if resumed else None
            wanted = (method.name, sparsity if self.max_kl is None else earlier and earlier.target)
            if earlier is None or (earlier.method, earlier.target) != wanted:
                check_new_folder(place, PlanError)
        if self.tokens is not None:
            check_count(self.tokens, "tokens", least=1)
        tokens = settings.tokens if self.tokens is None else self.tokens
        config = read_model_config(hub.resolve(self.model, ("config",)))
        texts = Texts(self.model, self.text, settings.window, tokens)
        check_amount(texts.count, settings, texts.window, held_out=self.max_kl is not None)
        mesh = None if self.devices.mesh is None else make_mesh(self.devices.mesh, config)
        model, first = load(self.model, mesh=mesh), is_first()
        check_searchable(model, method)
        if state is None or not kept(state):  # a search that goes on takes less
            spent = dataclasses.replace(settings, tokens=texts.count * texts.window)
            if line := forecast(model, [method], spent, len(sparsities), texts.sampled_tokens):
                tries = "" if self.max_kl is None else ", more for the sparsities that are tried"
                print(line + tries, file=sys.stderr, flush=True)
        windows = texts.windows(model, self.seed)
        keeps = None if state is None else Place(state, goes_on_from)
        options = {"progress": first, "text": texts.record, "state": keeps, "kinds": texts.kinds}
        if self.max_kl is None:
            plans = calibrate_targets(model, windows, sparsities, name, self.seed, settings, **options)
        else:
            plans = [calibrate_to_kl(model, windows, self.max_kl, name, self.seed, settings, **options)]
        if not first:
            return
        show = console()
        for plan, place in zip(plans, places, strict=True):
            earlier = _written(place) if resumed else None
            written = place if earlier is not None and earlier.has_numbers_of(plan) else _save(plan, place)
            if "plan" in plan.held_out:
                show.print(plan_table(plan))
            for note in plan.history.get("notes", []):
                show.print(f"note: {note}", highlight=False)
            rate = f"{plan.mean_sparsity:.4f} sparsity" if plan.bits is None else f"{plan.bits:.4g} bits a weight"
            print(f"{plan.method} plan at {rate}: {written}")
        remove_state(keeps)


def _written(place: Path) -> SparsityPlan | None:
    """The plan in a folder, if there is one."""
    from wisparse_jax.sparsity import SparsityPlan

    try:
        return SparsityPlan.load(place) if place.is_dir() else None
    except PlanError:
        return None


def _save(plan: SparsityPlan, place: Path) -> Path:
    """Write a plan where it was wanted or, if that has become impossible, where it can be."""
    import tempfile

    try:
        plan.save(place)
    except PlanError as error:
        rescued = Path(tempfile.mkdtemp(prefix="wisparse-")) / place.name
        plan.save(rescued)
        print(f"wisparse: {error}; the plan was written to {rescued} instead", file=sys.stderr)
        return rescued
    return place
