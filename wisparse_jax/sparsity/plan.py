"""The sparsity plan: what a search produces and a model is run with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from wisparse_jax.errors import PlanError
from wisparse_jax.files import expanded
from wisparse_jax.models.basis import Basis
from wisparse_jax.models.config import LAYERS, LlamaConfig
from wisparse_jax.sparsity.planes import PlaneCurves, check_curves

PLAN_FILE = "plan.json"
HISTORY_FILE = "history.json"
TENSORS_FILE = "tensors.safetensors"
_NUMBERS = ("exponent", "sparsity", "threshold")

# Layer name -> a float32 vector: channel gains `[in]` or biases `[out]` of a block.
Vectors = dict[str, Float[Array, "_"]]


@dataclasses.dataclass(frozen=True, eq=False)
class SparsityPlan:
    """Per-layer exponents, sparsities and thresholds of one model; with them, where the method has any, a basis that
    the model is folded into, channel gains for the score, and biases.

    Rows are blocks, columns the layers in the order of `LAYERS`. `thresholds` are on the score: tau of
    `|x_i| * max(g_i^alpha, 1e-4) >= tau`; `g` is `||W_i||` of the (folded) weights unless `gains` says otherwise. The
    sparsities' mean, weighted by each layer's number of weights (`layer_weights`), is `target`; `realised` is what the
    thresholds skip on the text that set them, which is the same but for activations that tie.

    With `planes` the plan is for weights in planes, and the curves decide all: sparsities are shares of the stored bits
    that are not read, thresholds those of each layer's first plane, and `at_bits` gives the plan of other bits.
    """

    method: str
    target: float
    exponents: Float64[np.ndarray, "blocks 7"]
    sparsities: Float64[np.ndarray, "blocks 7"]
    thresholds: Float64[np.ndarray, "blocks 7"]
    layer_weights: tuple[int, ...]
    fingerprint: str
    seed: int
    realised: Float64[np.ndarray, "blocks 7"] | None = None  # None in plans of format 1
    basis: Basis | None = None
    gains: list[Vectors] | None = None
    biases: list[Vectors] | None = None
    planes: PlaneCurves | None = None
    calibration: dict[str, Any] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    held_out: dict[str, Any] = dataclasses.field(default_factory=dict)
    timings: dict[str, float] = dataclasses.field(default_factory=dict)
    history: dict[str, Any] = dataclasses.field(default_factory=dict)
    version: str = ""

    @property
    def mean_sparsity(self) -> float:
        """The mean over all layers, weighted by parameter count."""
        return self._mean(self.sparsities)

    @property
    def mean_realised(self) -> float:
        """The same mean of what the thresholds skip on the calibration text, as far as the plan knows."""
        return self._mean(self.sparsities if self.realised is None else self.realised)

    @property
    def block_sparsities(self) -> Float64[np.ndarray, " blocks"]:
        """Each block's mean over its layers, weighted by parameter count."""
        weights = np.asarray(self.layer_weights, np.float64)
        return self.sparsities @ (weights / weights.sum())

    @property
    def bits(self) -> float | None:
        """The bits that are read of a weight on average, scales counted; None but for a plan for planes."""
        return None if self.planes is None else (1 - self.target) * self.planes.stored_bits

    def weights(self, asked: str | None) -> str | None:
        """The format that the block linears are rounded to for the plan: its own if it is for planes, or what is asked.

        Raises:
            PlanError: another one than its own is asked for.
        """
        if self.planes is None:
            return asked
        if asked not in (None, self.planes.format):
            raise PlanError(f"weights = {asked!r}: the plan is for {self.planes.format} weights")
        return self.planes.format

    def at_bits(self, bits: float) -> SparsityPlan:
        """The plan of the same planes that reads so many bits of a weight, scales counted; nothing is searched.

        Raises:
            PlanError: not a plan for planes, or bits beyond what its curves reach.
        """
        if self.planes is None:
            raise PlanError(
                f"bits = {bits}: expected a plan for planes, found one of {self.method}, which has one rate"
            )
        if not isinstance(bits, int | float) or not bits > 0:
            raise PlanError(f"bits = {bits}: expected a positive number")
        target = 1 - bits / self.planes.stored_bits
        skipped = self.planes.skipped(self.layer_weights, target)
        sparsities = self.planes.layer_shares(skipped)
        first = self.planes.thresholds_at(skipped)[:, :, 0]
        return dataclasses.replace(
            self, target=target, sparsities=sparsities, realised=sparsities, thresholds=first, held_out={}
        )

    def held_out_rows(self) -> list[tuple[str, str, str, str]]:
        """What was measured on held-out windows, for a table: the plan as "plan" or what it was compared with,
        perplexity, KL in nats per token, realised sparsity; a dash for what is no number."""

        def shown(value: Any, digits: int) -> str:
            return f"{value:z.{digits}f}" if isinstance(value, int | float) else "-"

        return [
            (name, shown(row.get("perplexity"), 2), shown(row.get("kl"), 4), shown(row.get("sparsity"), 4))
            for name, row in self.held_out.items()
            if isinstance(row, dict)
        ]

    def _mean(self, table: Float64[np.ndarray, "blocks 7"]) -> float:
        weights = np.asarray(self.layer_weights, np.float64)
        return float((table @ (weights / weights.sum())).mean())

    def has_numbers_of(self, other: SparsityPlan) -> bool:
        """Whether two plans of one model do the same at decode, to the digits that are saved; records may differ."""
        from wisparse_jax.sparsity.storage import saved_numbers

        (one, tensors), (two, others) = saved_numbers(self), saved_numbers(other)
        same = self.fingerprint == other.fingerprint and one == two and tensors.keys() == others.keys()
        return same and all(np.array_equal(tensors[name], others[name]) for name in tensors)

    def check_model(self, fingerprint: str, config: LlamaConfig) -> None:
        """Refuse a model that the plan was not made for.

        Raises:
            PlanError: another number of blocks, other weights, or tensors and sizes that are not those of the model.
        """
        if len(self.exponents) != config.num_blocks:
            raise PlanError(f"plan is for a model of {len(self.exponents)} blocks; this model has {config.num_blocks}")
        if self.fingerprint != fingerprint:
            raise PlanError(
                f"plan is for another model: its fingerprint is {self.fingerprint[:16]!r}, "
                f"this model's is {fingerprint[:16]!r}"
            )
        if self.layer_weights != config.layer_weights:
            raise PlanError(f"layer_weights: expected the model's {config.layer_weights}, found {self.layer_weights}")
        expected: dict[str, tuple[Any, tuple[int, ...]]] = {}
        if self.basis is not None:
            expected |= {"basis.stream": (self.basis.stream, (config.hidden_size,) * 2)}
            size = (config.num_blocks, config.num_kv_heads, config.head_dim, config.head_dim)
            expected |= {"basis.heads": (self.basis.heads, size)}
        for field, axis, vectors in (("gains", 0, self.gains), ("biases", 1, self.biases)):
            for b, block in enumerate(vectors or ()):
                for name, vector in block.items():
                    expected[f"{field}[{b}].{name}"] = vector, config.layer_shapes[name][axis : axis + 1]
        if self.planes is not None:
            count = len(self.planes.plane_bits)
            for b, block in enumerate(self.planes.gains):
                for name, vectors in block.items():
                    expected[f"planes.gains[{b}].{name}"] = vectors, (count, config.layer_shapes[name][0])
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise PlanError(f"{name}: expected the model's shape {shape}, found {tuple(tensor.shape)}")

    def save(self, path: str | Path) -> None:
        """Write the plan as a folder; it appears whole or not at all.

        Raises:
            PlanError: the folder exists already, or cannot be written.
        """
        from wisparse_jax.sparsity.storage import write_plan

        write_plan(self, expanded(path))

    def push(self, repository: str, base_model: str | None = None, private: bool = False) -> str:
        """Upload the plan to the hub, with a generated card; the repository `org/name` is made if there is none.

        Args:
            repository: `org/name`, for `--plan org/name`.
            base_model: the hub id of the model that the plan is for, for the card; by default the one that it was
                calibrated as, where that was a hub id.
            private: of a repository that is made.

        Returns:
            The address of the commit.

        Raises:
            PlanError: not a repository's name, no permission, or no network.
        """
        from wisparse_jax.sparsity.sharing import push_plan

        return push_plan(self, repository, base_model, private)

    @staticmethod
    def load(path: str | Path) -> SparsityPlan:
        """Read a plan, a folder or its plan.json or a hub id (`org/name`), and check every number in it.

        Raises:
            PlanError: not a plan, another format version, or damaged; names the file and the field.
        """
        from wisparse_jax.sparsity.sharing import plan_folder
        from wisparse_jax.sparsity.storage import read_plan

        return read_plan(plan_folder(path))


def check_numbers(plan: SparsityPlan) -> None:
    """Refuse a plan whose numbers are out of range or contradict each other.

    Raises:
        PlanError: the field, what was expected and what was found.
    """
    upper = {"exponent": 16.0, "sparsity": 1.0, "threshold": float(np.finfo(np.float32).max)}
    tables = dict(zip(_NUMBERS, (plan.exponents, plan.sparsities, plan.thresholds), strict=True))
    for key, table in tables.items():
        for b, i in np.argwhere(~((table >= 0) & (table <= upper[key]))):
            where = f"blocks[{b}].{LAYERS[i]}.{key}"
            raise PlanError(f"{where}: expected a finite number from 0 to {upper[key]:g}, found {table[b, i]!r}")
    if not 0 <= plan.target <= 1:
        raise PlanError(f"target: expected a finite number from 0 to 1, found {plan.target!r}")
    if any(not 1 <= weight < 2**53 for weight in plan.layer_weights):
        raise PlanError(f"layer_weights: expected numbers of weights, found {plan.layer_weights}")
    if plan.planes is not None:
        check_curves(plan.planes, len(plan.exponents))
    if not abs(plan.mean_sparsity - plan.target) <= 1e-6:
        raise PlanError(f"blocks: their mean sparsity is {plan.mean_sparsity:.6f}, but target = {plan.target}")


def check_basis(basis: Basis, where: str) -> None:
    """Refuse matrices that are not orthogonal.

    Raises:
        PlanError: which one, and by how much.
    """
    for name, matrix in (("stream", basis.stream), ("heads", basis.heads)):
        product = jnp.matmul(jnp.swapaxes(matrix, -1, -2), matrix, precision="highest")
        # NumPy's maximum, as XLA's passes NaN by on a CPU.
        off = np.max(np.abs(np.asarray(product) - np.eye(matrix.shape[-1])))
        if not off < 1e-3:
            raise PlanError(f"{where}: tensor basis.{name} is not orthogonal: off by {off:.2g}")
