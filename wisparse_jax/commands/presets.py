"""`wisparse presets`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Presets:
    """List the search settings that `calibrate --config NAME` knows, and what each spends."""

    def run(self) -> None:
        """Print the list."""
        from wisparse_jax.presets import description, presets
        from wisparse_jax.search import read_settings

        for name, file in presets().items():
            settings = read_settings(file)
            candidates = settings.population * settings.generations
            print(f"{name}: {description(file)}")
            print(
                f"  {settings.tokens:,} tokens of text; block budgets from {candidates:,} candidates on "
                f"{settings.block_tokens:,} tokens: {candidates * settings.block_tokens:,} tokens forwarded"
            )
