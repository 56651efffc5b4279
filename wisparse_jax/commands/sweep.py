"""`wisparse sweep`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from wisparse_jax.commands.options import Unset
from wisparse_jax.errors import WisparseError

if TYPE_CHECKING:
    from wisparse_jax.commands.texts import Texts
    from wisparse_jax.models.model import Model
    from wisparse_jax.search import SearchSettings
    from wisparse_jax.search.state import Place

TABLE, PICTURES, CONDITIONS, PLANS = "sweep.csv", ("sweep.png", "sweep-dark.png"), "sweep.json", "plans"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Plans of several methods and sparsities, one calibration a method, measured together: a table and a figure."""

    model: Positional[str]
    """A folder, a hub id, or `demo`."""
    out: Path
    """Folder to write: the table, the figure, and the plans; it must not exist."""
    methods: tuple[str, ...] = ("uniform", "teal", "wisparse-plus")
    """Some of those that `wisparse methods` lists."""
    sparsity: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)
    """The targets."""
    text: tuple[str, ...] = ("self",)
    """Calibration text: UTF-8 files, and `self` for text that the dense model samples; several have equal shares."""
    evaluate: str = "self"
    """Text to measure on: a UTF-8 file other than that of --text, or `self`, which is sampled anew."""
    tokens: Unset[int | None] = None
    """Tokens of calibration text; by default those of the configuration."""
    evaluation_tokens: int = 16_384
    """Tokens of text to measure on, in whole windows; half of them are scored."""
    seed: int = 0
    """Seed of the calibration text, the statistics and the searches."""
    config: Unset[str | None] = None
    """The search's settings: quick, default, thorough or paper (`wisparse presets`), or a YAML file; by default the
    preset that fits the model and the device."""

    def run(self) -> None:
        """Search the plans, measure them and write the folder."""
        from wisparse_jax.arguments import check_count, check_seed
        from wisparse_jax.commands.settings import settings_for
        from wisparse_jax.commands.texts import check_text
        from wisparse_jax.files import check_new_folder
        from wisparse_jax.report.comparison import EVALUATION_SEED
        from wisparse_jax.search import remove_state
        from wisparse_jax.search.pipeline import check_sparsity, resolve
        from wisparse_jax.search.state import check_unused

        # Everything that can be refused is refused before any work is done.
        settings = settings_for(self.config, self.model)
        for name, values in (("methods", self.methods), ("sparsity", self.sparsity)):
            # Six digits of a sparsity name the folder of a plan.
            if not values or len({v if isinstance(v, str) else f"{v:g}" for v in values}) < len(values):
                raise WisparseError(f"{name} = {' '.join(map(str, values))}: expected at least one, and none twice")
        for method in self.methods:
            resolve(method, settings)
        for sparsity in self.sparsity:
            check_sparsity(sparsity, settings)
        check_seed(self.seed)
        check_count(settings.tokens if self.tokens is None else self.tokens, "tokens", least=1)
        check_count(self.evaluation_tokens, "evaluation-tokens", least=1)
        for text in (*self.text, self.evaluate):
            check_text(text)
        if self.evaluate != "self" and self.evaluate in self.text:
            raise WisparseError(f"{self.evaluate}: expected another text to measure on than to calibrate on")
        if self.evaluate in self.text and self.seed == EVALUATION_SEED:
            raise WisparseError(f"seed = {self.seed}: is that of the text to measure on: expected another one")
        if (self.out / CONDITIONS).is_file():  # of a run that was killed when all was written
            for method in self.methods:
                remove_state(self._state(method))
        check_new_folder(self.out, WisparseError)
        for method in self.methods:
            check_unused(self._state(method).folder)
        # TEAL is one of the methods where it is asked for: no need for each plan to search it for itself.
        compare_teal = settings.compare_teal and "teal" not in self.methods
        self._run(dataclasses.replace(settings, compare_teal=compare_teal))

    def _state(self, method: str) -> Place:
        from wisparse_jax.interruption import goes_on_from
        from wisparse_jax.search.state import Place

        return Place(self.out.with_name(f".{self.out.name}.{method}.search"), goes_on_from)

    def _forecast(self, model: Model, settings: SearchSettings, calibration: Texts, evaluation: Texts) -> None:
        """Say how long all of it will take, where that is long."""
        from wisparse_jax.search.cost import forecast
        from wisparse_jax.search.pipeline import resolve

        tokens, read = (texts.count * texts.window for texts in (calibration, evaluation))
        sampled = calibration.sampled_tokens + evaluation.sampled_tokens
        methods = [resolve(method, settings) for method in self.methods]
        models = 1 + len(methods) * len(self.sparsity)
        spent = dataclasses.replace(settings, tokens=tokens)
        if line := forecast(model, methods, spent, len(self.sparsity), sampled, read * models):
            print(line, file=sys.stderr, flush=True)

    def _run(self, settings: SearchSettings) -> None:
        from wisparse_jax.commands.texts import Texts
        from wisparse_jax.files import new_folder
        from wisparse_jax.models.loading import load
        from wisparse_jax.report.comparison import COLUMNS, EVALUATION_SEED, append_rows, compare, conditions, table
        from wisparse_jax.report.curves import quality_picture
        from wisparse_jax.search import calibrate_targets, remove_state
        from wisparse_jax.sparsity import SparsityPlan

        tokens = settings.tokens if self.tokens is None else self.tokens
        # What can be refused of a file is refused before the model is loaded.
        asked = [Texts(self.model, self.text, settings.window, tokens)]
        asked.append(Texts(self.model, (self.evaluate,), settings.window, self.evaluation_tokens))
        model = load(self.model)
        self._forecast(model, settings, *asked)
        windows, held_out = (
            texts.windows(model, seed) for texts, seed in zip(asked, (self.seed, EVALUATION_SEED), strict=True)
        )
        names = [texts.record for texts in asked]
        plans: dict[tuple[str, float], SparsityPlan] = {}
        for number, method in enumerate(self.methods, 1):
            print(f"{method}, method {number} of {len(self.methods)}", file=sys.stderr, flush=True)
            options = {"progress": True, "text": names[0], "state": self._state(method), "kinds": asked[0].kinds}
            searched = calibrate_targets(model, windows, self.sparsity, method, self.seed, settings, **options)
            plans |= {(plan.method, target): plan for target, plan in zip(self.sparsity, searched, strict=True)}
        common = {"model": model.name, "calibration": names[0], "evaluation": names[1], "seed": self.seed}
        common |= {"group": "method", "calibration_tokens": windows.size}
        rows = [common | row for row in compare(model, plans, {names[1]: held_out}, progress=True)]
        with new_folder(self.out, WisparseError) as folder:
            append_rows(folder / TABLE, COLUMNS, rows)
            for name, dark in zip(PICTURES, (False, True), strict=True):
                (folder / name).write_bytes(quality_picture(rows, dark))
            where = json.dumps(common | {"dtype": str(model.dtype)} | conditions(settings), indent=1)
            (folder / CONDITIONS).write_text(where + "\n", encoding="utf-8")
            for (method, target), plan in plans.items():
                plan.save(folder / PLANS / f"{method}-{target:g}")
        for method in self.methods:  # as late as this: a killed sweep goes on with the methods that it had ended
            remove_state(self._state(method))
        tokens, dense = rows[0]["evaluation_tokens"], rows[0]["dense_perplexity"]
        print(f"{tokens} tokens of {names[1]}, calibrated on {names[0]}; dense perplexity {dense:.2f}\n\n{table(rows)}")
        print(self.out)
