"""A basis in which skipping channels costs little, found by `search.basis`; the model goes on folded into it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from wisparse_jax.calibration.dense import Calibration, run_dense, run_dense_on
from wisparse_jax.calibration.planes import depths_of
from wisparse_jax.calibration.settings import GradientSettings, Settings, setting, switch
from wisparse_jax.errors import WisparseError
from wisparse_jax.models.basis import Basis as Matrices
from wisparse_jax.models.config import LlamaConfig
from wisparse_jax.models.formats import is_rounded
from wisparse_jax.models.model import Model
from wisparse_jax.search.basis import (
    GROUPS_A_STEP,
    TOKENS_A_STEP,
    measure_moments,
    refine_basis,
    start_basis,
)
from wisparse_jax.search.context import Context
from wisparse_jax.search.draft import Draft
from wisparse_jax.search.judge import JudgeSettings
from wisparse_jax.search.stages.base import BACKWARD, HELD_OUT, Part, Size, Stage, weights_a_token
from wisparse_jax.search.state import Arrays

BASES = ("none", "eigen", "refined")
# Of a window's positions, at its end, those that a basis is found on: all but the first few, which see little text.
BASIS_SHARE = 31 / 32
UNREAD = 0.25  # share of channels that are not read at all, for which a basis for planes is refined
HEADS_STEP = 0.7  # a step of the heads, in steps of the stream on skipped energy
SOLVE = 8  # Cayley's transform of a matrix, and back, in products of two such matrices


@dataclasses.dataclass(frozen=True)
class BasisSettings(JudgeSettings, GradientSettings):
    """Settings of the basis."""

    basis: str = switch(*BASES)
    absolute_steps: int = setting(300, largest=10**6, zero=True)
    skipped_steps: int = setting(1_000, largest=10**6, zero=True)
    heads_steps: int = setting(300, largest=10**6, zero=True)
    basis_rate: float = setting(0.01, largest=1)


@dataclasses.dataclass(frozen=True)
class Basis(Stage):
    """The basis of eigenvectors, or the one that is refined from it; kept if uniform sparsity loses less in it, or
    planes that each layer reads the same share of."""

    rows = ("moments", "basis")
    switches = ("basis",)
    shared = True
    kind: str = "refined"
    planes: str | None = None  # the format of the weights that it is refined for, if they are read in planes
    settings: BasisSettings = dataclasses.field(default_factory=BasisSettings)

    @property
    def switched(self) -> dict[str, str]:
        """The basis."""
        return {"basis": self.kind}

    def configured(self, settings: Settings) -> Basis:
        """With the basis that the settings name, if any."""
        own = BasisSettings.of(settings)
        return dataclasses.replace(self, kind=self.kind if own.basis == "method" else own.basis, settings=own)

    def check(self, model: Model, method: str) -> None:
        """Refuse weights that are rounded already, which no basis can be folded into."""
        if self.kind != "none" and is_rounded(model.params):
            raise WisparseError(
                f"{method} looks for a basis, which rounded weights cannot be folded into: calibrate the model as it "
                "was, and run the plan with --weights int8"
            )

    def parts(self, size: Size) -> list[Part]:
        """Moments, refinement, and the dense run in the basis."""
        if self.kind == "none":
            return []
        refined = self._refinement(size.config) if self.kind == "refined" else 0.0
        return [
            Part("moments", size.text + BACKWARD * self.settings.gradient_tokens, kind="gradients", programs=3),
            Part("basis", refined, kind="basis", programs=4),
            Part("statistics", tokens=size.text),
            Part(HELD_OUT, size.held_out),
            *size.judged(),
        ]

    def _refinement(self, config: LlamaConfig) -> float:
        hidden, own = config.hidden_size, self.settings
        # Forward and back: the samples times the basis, each group's gradients for skipped energy, and a solve.
        step = BACKWARD * GROUPS_A_STEP * TOKENS_A_STEP * hidden**2 + SOLVE * hidden**3
        skipping = BACKWARD * GROUPS_A_STEP * hidden**3
        work = own.absolute_steps * step + own.skipped_steps * (step + skipping)
        # The small matrices of the heads take sorting and solving more than multiplying: as measured, on two models.
        work += HEADS_STEP * own.heads_steps * (step + skipping)
        return work / weights_a_token(config)

    def run(self, search: Context, draft: Draft) -> Draft:
        """The draft in the basis, if that helps."""
        if self.kind == "none":
            return draft
        found = search.keep("basis", lambda: self._find(search, draft.calibration))
        search.progress.pass_by("moments", "basis")
        basis = Matrices(jnp.asarray(found["stream"]), jnp.asarray(found["heads"]))
        with search.stage("statistics"):
            made = run_dense(search.model, search.windows, self.settings, search.seed, search.text, basis)
        with search.stage(HELD_OUT):
            held_out = search.judge.run_dense(made)
        losses = {name: value.tolist() for name, value in found.items() if name.startswith("loss ")}
        draft = draft.recorded("basis", losses)
        made = dataclasses.replace(draft, calibration=made, held_out=held_out)
        return search.better_for_all("basis", draft, made, planes=self.planes)

    def _find(self, search: Context, calibration: Calibration) -> Arrays:
        own, seed = self.settings, search.seed
        with search.stage("moments"):
            # The basis has many numbers and the text few tokens: those that run dense tell of it as well.
            wide = run_dense_on(calibration, search.windows, dataclasses.replace(own, sparse_share=BASIS_SHARE), seed)
            moments = measure_moments(wide, own.gradient_tokens, seed)
            del wide
            search.spent.tokens += BACKWARD * own.gradient_tokens
        with search.stage("basis"):
            basis, losses = start_basis(moments), {}
            if self.kind == "refined":
                steps = own.absolute_steps, own.skipped_steps, own.heads_steps
                planes = () if self.planes is None else depths_of(calibration.params, self.planes)
                unread = UNREAD if planes else own.basis_sparsity
                basis, losses = refine_basis(moments, basis, unread, steps, own.basis_rate, seed, search.steps, planes)
            curve = {f"loss {name}": np.asarray(pair) for name, pair in losses.items()}
            return {name: np.asarray(value) for name, value in basis._asdict().items()} | curve
