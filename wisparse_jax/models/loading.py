"""Load a model or its tokenizer from any MODEL: a folder, a converted checkpoint, a hub id or `demo`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from wisparse_jax.errors import ConfigError, WisparseError
from wisparse_jax.files import read_json
from wisparse_jax.models import hub
from wisparse_jax.models.basis import Basis, fold, folded_config
from wisparse_jax.models.checkpoint import read_params, stored_basis
from wisparse_jax.models.config import LlamaConfig, read_config
from wisparse_jax.models.formats import check_offered
from wisparse_jax.models.mesh import make_mesh, place_on
from wisparse_jax.models.model import Model, Origin
from wisparse_jax.models.tokenizer import Tokenizer, read_tokenizer

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class _GenerationConfig:
    eos_token_id: int | list[int] | None = None


def load(
    name: str | Path,
    dtype: str | None = None,
    weights: str | None = None,
    basis: Basis | None = None,
    verify: bool = True,
    head: str | None = None,
    check: Callable[[str, LlamaConfig], None] | None = None,
    mesh: str | Mapping[str, int] | Mesh | None = None,
) -> Model:
    """Load a dense model onto the default device, or spread over several; `wisparse_jax.load` takes a plan too.

    Args:
        name: a folder (in Hugging Face format, or written by `wisparse convert`), a hub id `org/name`, or `demo`.
        dtype: "float32", "bfloat16" or "float16", of weights and activations; None is bfloat16 on GPU and TPU,
            float32 on CPU.
        weights: the format to round block linears to: "int8", one scale per output channel; "int4", one for 128 of
            them and an input channel; "int4+2+2", 8 bits in nested planes; None keeps them as they are.
        basis: a plan's, to fold the weights into; tensor by tensor, before any rounding.
        verify: compare all that a converted checkpoint holds with its digests; some 0.1 s for every gigabyte.
        head: "int8" for the head in int8, one scale per token of the vocabulary; None keeps it as it is.
        check: called with the fingerprint and the architecture before anything is folded; raises to refuse.
        mesh: the devices to spread it over, such as "data=2,model=4" or `jax.sharding.Mesh`, see `models.mesh`; every
            device reads its own part of the weights.

    Raises:
        ConfigError: config.json or generation_config.json is missing, damaged or asks for what is not supported.
        WeightsError: weights are missing, unexpected, mis-shaped, damaged or not finite.
        WisparseError: no such model, an unknown dtype or kind of weights, one that is folded into another basis, or a
            mesh that the model or the devices do not fit.
    """
    check_kinds(dtype, weights, head)
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    folder = hub.resolve(name, ("config", "weights"))
    config = read_model_config(folder)
    made = None if mesh is None else make_mesh(mesh, config, weights)
    params, stored = read_params(folder, config, dtype, verify, made)
    if check is not None:
        check(stored, config)
    folded = stored_basis(folder)
    if basis is not None and folded is not None and folded != basis.digest():
        raise WisparseError(f"{folder}: its weights are folded into the basis of another plan")
    if basis is not None and folded is None:
        config, params, folded = folded_config(config), fold(config, params, basis, consume=True), basis.digest()
    called = str(name) if name == hub.DEMO or hub.is_hub_id(name) else folder.resolve().name
    model = Model(config, place_on(made, config, params), None, Origin(called, stored, folded))
    if weights is not None or head is not None:
        from wisparse_jax.models.quantise import quantise

        return quantise(model, weights, head)
    return model


def check_kinds(dtype: str | None = None, weights: str | None = None, head: str | None = None) -> None:
    """Refuse kinds of numbers that `load` does not know.

    Raises:
        WisparseError: an unknown dtype or kind of weights.
    """
    check_offered(weights, head)
    if dtype is not None and dtype not in DTYPES:
        raise WisparseError(f"dtype = {dtype!r}: expected one of {', '.join(DTYPES)}")


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load a model's tokenizer; `name` as in `load`.

    Raises:
        WisparseError: no such model, or no usable tokenizer in its folder.
    """
    return read_tokenizer(hub.resolve(name, ("config", "tokenizer")))


def read_model_config(folder: Path) -> LlamaConfig:
    """The configuration of a model folder; end-of-sequence ids from generation_config.json where that gives any.

    Instruction-tuned models end a turn with other tokens than a document, and list them there.

    Raises:
        ConfigError: see `config.read_config`; also a damaged generation_config.json.
        WeightsError: a damaged manifest of a converted checkpoint.
    """
    config = read_config(folder)
    if stored_basis(folder) is not None:
        config = folded_config(config)
    path = folder / "generation_config.json"
    if not os.path.lexists(path):
        return config
    ids = read_json(path, _GenerationConfig, ConfigError).eos_token_id
    if ids is None:
        return config
    try:
        return dataclasses.replace(config, eos_token_ids=tuple(ids) if isinstance(ids, list) else (ids,))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
