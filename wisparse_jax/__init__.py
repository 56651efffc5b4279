"""WiSparse in JAX: make a Llama-family model skip the channels that do not matter, without training.

```python
import wisparse_jax as ws

model = ws.load("demo")
plan = ws.calibrate(model, tokens, sparsity=0.5)  # tokens: int32 [windows, length]
sparse = ws.apply(model, plan)
logits = sparse(tokens)
```
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wisparse_jax.calibration import Calibration as Calibration
    from wisparse_jax.calibration import run_dense as run_dense
    from wisparse_jax.errors import ConfigError as ConfigError
    from wisparse_jax.errors import PlanError as PlanError
    from wisparse_jax.errors import WeightsError as WeightsError
    from wisparse_jax.errors import WisparseError as WisparseError
    from wisparse_jax.evaluation import evaluate as evaluate
    from wisparse_jax.inference import generate as generate
    from wisparse_jax.inference import stream as stream
    from wisparse_jax.models.loading import load_tokenizer as load_tokenizer
    from wisparse_jax.models.model import Model as Model
    from wisparse_jax.models.quantise import quantise as quantise
    from wisparse_jax.presets import preset as preset
    from wisparse_jax.search import SearchSettings as SearchSettings
    from wisparse_jax.search import calibrate as calibrate
    from wisparse_jax.search import calibrate_targets as calibrate_targets
    from wisparse_jax.search import calibrate_to_kl as calibrate_to_kl
    from wisparse_jax.search import remove_state as remove_state
    from wisparse_jax.search import with_budgets as with_budgets
    from wisparse_jax.sparsity import SparsityPlan as SparsityPlan
    from wisparse_jax.sparsity import apply as apply
    from wisparse_jax.sparsity import convert as convert
    from wisparse_jax.sparsity import load as load

# Loaded on first use, so that `import wisparse_jax` and `wisparse --help` stay fast.
_HOME = {
    "ConfigError": "errors",
    "PlanError": "errors",
    "WeightsError": "errors",
    "WisparseError": "errors",
    "preset": "presets",
    "evaluate": "evaluation",
    "generate": "inference",
    "stream": "inference",
    "load_tokenizer": "models.loading",
    "Model": "models.model",
    "quantise": "models.quantise",
    "Calibration": "calibration",
    "SearchSettings": "search",
    "run_dense": "calibration",
    "calibrate": "search",
    "calibrate_targets": "search",
    "calibrate_to_kl": "search",
    "remove_state": "search",
    "with_budgets": "search",
    "load": "sparsity",
    "convert": "sparsity",
    "SparsityPlan": "sparsity",
    "apply": "sparsity",
}
# By an old name what took its place; the next version is without the old ones, see `deprecated.py`.
_NOW = {
    "Llama": "Model",
    "SparseLlama": "Model",
    "load_sparse": "load(..., plan=...)",
    "apply_plans": "apply(model, plans)",
    "convert_with_plan": "convert(..., plan=...)",
    "calibrate_to_divergence": "calibrate_to_kl",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _NOW:
        warnings.warn(f"wisparse_jax.{name} is wisparse_jax.{_NOW[name]} now", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module("wisparse_jax.deprecated"), name)
    if name not in _HOME:
        raise AttributeError(f"module 'wisparse_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"wisparse_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
