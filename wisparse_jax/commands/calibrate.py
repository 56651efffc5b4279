"""`wisparse calibrate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from wisparse_jax.errors import WisparseError


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """Search a sparsity plan for a model."""

    model: Positional[str]
    """A folder, a hub id, or `demo`."""
    out: Path
    """Folder to write the plan to; it must not exist."""
    sparsity: float = 0.5
    """Share of the channels to skip, averaged over all block linears weighted by parameter count."""
    method: str = "wisparse"
    """wisparse, teal, wina or uniform."""
    text: str = "self"
    """Calibration text: a UTF-8 file, or `self` for text that the dense model samples."""
    tokens: int | None = None
    """Tokens of calibration text; by default those of the configuration."""
    seed: int = 0
    """Seed of the sampled text, the statistics and the searches."""
    config: str | None = None
    """The search's settings: quick, default or paper (`wisparse presets`), or a YAML file."""

    def run(self) -> None:
        """Search and save the plan."""
        from wisparse_jax.evaluation import text_windows
        from wisparse_jax.inference import check_variety, sample_windows
        from wisparse_jax.models.loading import load, load_tokenizer
        from wisparse_jax.presets import settings_file
        from wisparse_jax.search import calibrate, read_settings
        from wisparse_jax.search.pipeline import check_sparsity
        from wisparse_jax.sparsity.methods import get_method

        # Everything that can be refused is refused before any work is done.
        settings = read_settings(settings_file(self.config))
        check_sparsity(self.sparsity, settings)
        get_method(self.method)
        if self.out.exists():
            raise WisparseError(f"{self.out}: exists already; a plan is never overwritten")
        if self.tokens is not None and self.tokens < 1:
            raise WisparseError(f"tokens = {self.tokens}: expected 1 or above")
        tokens = settings.tokens if self.tokens is None else self.tokens
        model = load(self.model)
        window = min(settings.window, model.config.context)
        if self.text == "self":
            windows = sample_windows(model, -(-tokens // window), window, seed=self.seed, progress=True)
        else:
            windows = text_windows(load_tokenizer(self.model), self.text, window, tokens)
        check_variety(windows, model.config.vocab_size)
        source = self.text if self.text == "self" else Path(self.text).name
        plan = calibrate(model, windows, self.sparsity, self.method, self.seed, settings, progress=True, text=source)
        plan.save(self.out)
        print(f"{self.method} plan at {plan.mean_sparsity:.4f} sparsity: {self.out}")
