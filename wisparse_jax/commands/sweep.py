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
    from numpy import ndarray

    from wisparse_jax.calibration import SearchSettings
    from wisparse_jax.models.llama import Llama

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
    text: str = "self"
    """Calibration text: a UTF-8 file, or `self` for text that the dense model samples."""
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
        """Calibrate, measure, write."""
        from wisparse_jax.arguments import check_count, check_seed
        from wisparse_jax.commands.settings import settings_for
        from wisparse_jax.commands.texts import check_text
        from wisparse_jax.files import check_new_folder
        from wisparse_jax.report.comparison import EVALUATION_SEED
        from wisparse_jax.search import remove_state
        from wisparse_jax.search.pipeline import check_sparsity, resolve

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
        for text in (self.text, self.evaluate):
            check_text(text)
        if self.text == self.evaluate != "self":
            raise WisparseError(f"{self.text}: expected another text to measure on than to calibrate on")
        if self.text == self.evaluate and self.seed == EVALUATION_SEED:
            raise WisparseError(f"seed = {self.seed}: is that of the text to measure on: expected another one")
        if (self.out / CONDITIONS).is_file():  # of a run that was killed when all was written
            for method in self.methods:
                remove_state(self._state(method))
        check_new_folder(self.out, WisparseError)
        # TEAL is one of the methods where it is asked for: no need for each plan to search it for itself.
        compare_teal = settings.compare_teal and "teal" not in self.methods
        self._run(dataclasses.replace(settings, compare_teal=compare_teal))

    def _state(self, method: str) -> Path:
        return self.out.with_name(f".{self.out.name}.{method}.search")

    def _forecast(self, model: Llama, settings: SearchSettings, files: list[ndarray | None]) -> None:
        """Say how long all of it will take, where that is long."""
        from wisparse_jax.search.cost import forecast
        from wisparse_jax.search.pipeline import resolve

        given = self.tokens or settings.tokens, self.evaluation_tokens
        tokens, read = (n if file is None else file.size for file, n in zip(files, given, strict=True))
        sampled = sum(n for file, n in zip(files, given, strict=True) if file is None)
        methods = [resolve(method, settings) for method in self.methods]
        models = 1 + len(methods) * len(self.sparsity)
        spent = dataclasses.replace(settings, tokens=tokens)
        if line := forecast(model, methods, spent, len(self.sparsity), sampled, read * models):
            print(line, file=sys.stderr, flush=True)

    def _run(self, settings: SearchSettings) -> None:
        from wisparse_jax.commands.texts import SELF, file_windows, sampled_windows, short_name
        from wisparse_jax.evaluation import evaluate
        from wisparse_jax.files import new_folder
        from wisparse_jax.models.loading import load
        from wisparse_jax.report.comparison import COLUMNS, EVALUATION_SEED, append_rows, conditions, figures, key
        from wisparse_jax.report.curves import quality_picture
        from wisparse_jax.report.tables import console, quality_table
        from wisparse_jax.search import calibrate_targets, remove_state
        from wisparse_jax.sparsity import SparsityPlan, apply_plans

        tokens = settings.tokens if self.tokens is None else self.tokens
        asked = ((self.text, tokens, self.seed), (self.evaluate, self.evaluation_tokens, EVALUATION_SEED))
        # What can be refused of a file is refused before the model is loaded.
        files = [None if t == SELF else file_windows(self.model, t, settings.window, n) for t, n, _ in asked]
        model = load(self.model)
        self._forecast(model, settings, files)
        windows, held_out = (
            sampled_windows(model, settings.window, n, seed) if file is None else file
            for file, (_, n, seed) in zip(files, asked, strict=True)
        )
        names = [short_name(text) for text in (self.text, self.evaluate)]
        plans: dict[tuple[str, float], SparsityPlan] = {}
        for number, method in enumerate(self.methods, 1):
            print(f"{method}, method {number} of {len(self.methods)}", file=sys.stderr, flush=True)
            how = {"progress": True, "text": names[0], "state": self._state(method)}
            made = calibrate_targets(model, windows, self.sparsity, method, self.seed, settings, **how)
            plans |= {(method, target): plan for target, plan in zip(self.sparsity, made, strict=True)}
        sparse = apply_plans(model, {key(*which): plan for which, plan in plans.items()})
        result = evaluate(model, held_out, sparse, progress=True)
        stated = {"model": model.name, "calibration": names[0], "evaluation": names[1], "seed": self.seed}
        stated |= {"group": "method", "calibration_tokens": windows.size}
        rows = [
            stated | {"variant": method, "method": method, "sparsity": target} | figures(result, method, target, plan)
            for (method, target), plan in plans.items()
        ]
        with new_folder(self.out, WisparseError) as folder:
            append_rows(folder / TABLE, COLUMNS, rows)
            for name, dark in zip(PICTURES, (False, True), strict=True):
                (folder / name).write_bytes(quality_picture(rows, dark))
            where = json.dumps(stated | {"dtype": str(model.dtype)} | conditions(settings), indent=1)
            (folder / CONDITIONS).write_text(where + "\n", encoding="utf-8")
            for (method, target), plan in plans.items():
                plan.save(folder / PLANS / f"{method}-{target:g}")
        for method in self.methods:  # as late as this: a killed sweep goes on with the methods that it had ended
            remove_state(self._state(method))
        console().print(quality_table(result, f"{result.tokens} tokens of {names[1]}, calibrated on {names[0]}"))
        print(self.out)
