"""`wisparse presets`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Presets:
    """List the search settings that `calibrate --config NAME` knows, and what each spends."""

    def run(self) -> None:
        """Print the list."""
        from wisparse_jax.calibration import read_settings
        from wisparse_jax.presets import description, presets

        for name, file in presets().items():
            settings = read_settings(file)
            basis = settings.absolute_steps + settings.skipped_steps + settings.heads_steps
            candidates = settings.population * settings.generations
            print(f"{name}: {description(file)}")
            print(
                f"  {settings.tokens:,} tokens of text. wisparse-plus: {basis:,} steps of the basis, gradients of "
                f"{settings.gradient_tokens:,} tokens, {settings.training_steps:,} steps of training. wisparse: "
                f"{candidates:,} candidates on {settings.block_tokens:,} tokens each."
            )
