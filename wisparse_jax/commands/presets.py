"""`wisparse presets`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from tyro.conf import Positional

from wisparse_jax.commands.options import Unset

if TYPE_CHECKING:
    from wisparse_jax.search import SearchSettings


@dataclasses.dataclass(frozen=True)
class Presets:
    """List the search settings that `calibrate --config NAME` knows, and what each spends (on MODEL)."""

    model: Unset[Positional[str | None]] = None
    """A folder, a hub id, or `demo`: what a search forwards for it, and roughly how long that takes on this device."""
    method: str = "wisparse-plus"
    """The method whose search it is, of those that `wisparse methods` lists."""

    def run(self) -> None:
        """Print each preset, and what it costs on the model if one is named."""
        from wisparse_jax.models.loading import load
        from wisparse_jax.presets import description, fitting_preset, preset, presets
        from wisparse_jax.search.cost import duration, measured_speed, rounded, search_parts, search_tokens
        from wisparse_jax.search.pipeline import resolve

        settings = {name: preset(name) for name in presets()}
        methods = {name: resolve(self.method, found) for name, found in settings.items()}
        model = None if self.model is None else load(self.model)
        speed = None if model is None else measured_speed(model)
        chosen = None if model is None else fitting_preset(model.config)
        for name, file in presets().items():
            mark = f" (the default here, {chosen[1]})" if chosen is not None and chosen[0] == name else ""
            print(f"{name}{mark}: {description(file)}")
            if model is None or speed is None:
                print(f"  {_parts(settings[name])}")
                continue
            stages = search_tokens(model.config, methods[name], settings[name])
            seconds = speed.seconds(search_parts(model.config, methods[name], settings[name]))
            total = sum(stages.values())
            most = max(stages, key=lambda stage: stages[stage])
            print(
                f"  {self.method}, one sparsity: up to {rounded(total)} tokens forwarded, {stages[most] / total:.0%} "
                f"of them for {_NAMES.get(most, most)}; roughly {duration(seconds)} here, compiling aside"
            )


_NAMES = {"comparison": "the comparison with TEAL"}


def _parts(settings: SearchSettings) -> str:
    basis = settings.absolute_steps + settings.skipped_steps + settings.heads_steps
    return (
        f"{settings.tokens:,} tokens of text. wisparse-plus: {basis:,} steps of the basis, gradients of "
        f"{settings.gradient_tokens:,} tokens, {settings.training_steps:,} steps of training. wisparse: "
        f"{settings.population * settings.generations:,} candidates on {settings.block_tokens:,} tokens each."
    )
