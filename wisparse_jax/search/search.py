"""One method's search on one text: its stages one after another, each one's time and cost on record.

What does not depend on the target is done once. Windows that are held out judge a plan at its end, and the stages that
may over-fit: one that does not improve their KL is dropped.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from wisparse_jax import __version__
from wisparse_jax.models.model import Model
from wisparse_jax.search.context import Context
from wisparse_jax.search.cost import expected, measured_rates
from wisparse_jax.search.draft import Draft
from wisparse_jax.search.judge import Judge, held_out_windows, in_planes, sparse_at
from wisparse_jax.search.methods import Method
from wisparse_jax.search.progress import Progress
from wisparse_jax.search.settings import SearchSettings
from wisparse_jax.search.stages import DenseRun, Size, Stage
from wisparse_jax.search.state import SearchState
from wisparse_jax.sparsity.plan import SparsityPlan


class Search:
    """A method's search: what targets share when it is made, the rest in `plan`."""

    def __init__(
        self,
        model: Model,
        windows: Int[np.ndarray, "windows length"],
        method: Method,
        seed: int,
        settings: SearchSettings,
        progress: bool,
        text: str,
        state: SearchState,
        targets: int,
        kinds: Sequence[str] = (),
    ):
        self.method, self.settings = method, settings
        held = held_out_windows(len(windows), settings)
        training, held_out = np.split(windows, [len(windows) - held])
        stages = tuple(stage.configured(settings) for stage in method.all_stages)
        size = Size(model.config, windows.size, held_out.size, stages)
        parts = expected(size, targets)
        rates = measured_rates(model, parts) if progress else None
        bar = Progress(method.name, parts, progress, state, rates)
        judge = Judge(model, held_out, settings, seed, kinds[len(training) :])
        self.context = Context(model, training, judge, seed, settings, text, bar, state)
        self._own = tuple(stage for stage in stages if not stage.shared)
        self._base = DenseRun().begin(self.context)
        for stage in stages:
            if stage.shared:
                self._base = stage.run(self.context, self._base)

    def plan(self, target: float) -> SparsityPlan:
        """Search what one target needs of its own, and give its plan."""
        draft = self._run(target, self._own)
        assert draft.thresholds is not None
        calibration, search = draft.calibration, self.context
        return SparsityPlan(
            method=self.method.name,
            target=float(target),
            exponents=draft.exponents,
            sparsities=draft.sparsities,
            thresholds=draft.thresholds.values,
            realised=draft.thresholds.realised,
            layer_weights=calibration.config.layer_weights,
            fingerprint=calibration.fingerprint,
            seed=search.seed,
            basis=calibration.basis,
            gains=calibration.gains if draft.own_gains else None,
            biases=draft.biases,
            planes=draft.planes,
            calibration={
                "model": search.model.name, **calibration.record, "held_out_windows": len(search.judge.windows)
            },
            settings=dataclasses.asdict(self.settings),
            held_out=draft.figures | {"forward_tokens": round(search.spent.tokens)},
            timings={name: round(seconds, 3) for name, seconds in search.progress.timings.items()},
            history=copy.deepcopy(draft.history),
            version=__version__,
        )  # fmt: skip

    def held_out_kl(self, target: float) -> float:
        """The KL of a target's plan without what is searched or trained for it, on the held-out windows."""
        if target == 0:
            return 0.0
        draft = self._run(target, tuple(stage for stage in self._own if stage.rough))
        if draft.planes is not None:
            return self.context.judge.kl(in_planes(draft.planes, draft.calibration, target), draft.held_out_runs)
        sparse = sparse_at(draft.calibration, draft.exponents, draft.sparsities, draft.held_out)
        return self.context.judge.kl(sparse, draft.held_out_runs)

    def close(self) -> None:
        """End the search: its bar stays as it is."""
        self.context.progress.close()

    def _run(self, target: float, stages: tuple[Stage, ...]) -> Draft:
        draft = self._base.at(target)
        for stage in stages:
            draft = stage.run(self.context, draft)
        return draft
