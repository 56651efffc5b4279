"""`wisparse methods`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Methods:
    """List the methods, and what each is made of."""

    def run(self) -> None:
        """Print a table of the methods."""
        from rich.table import Table

        from wisparse_jax.report.tables import console
        from wisparse_jax.search.methods import DEFAULT, METHODS
        from wisparse_jax.search.stages import Basis, Budgets, Planes, Score, Training

        # Just within 80 columns; the words of each stand below.
        table = Table("method", "basis", "score", "exponents", "budgets", "biases", title="methods")
        by = {"norms": "weight norms", "gradients": "gradients", "trained": "gradients,\nthen trained"}
        for name, method in METHODS.items():
            planes = next((stage for stage in method.stages if isinstance(stage, Planes)), None)
            if planes is not None:
                kind = next((stage.kind for stage in method.stages if isinstance(stage, Basis)), "none")
                words, exponent = ("magnitudes", "0") if planes.magnitudes else ("gradients", "1")
                table.add_row(name, kind, words, exponent, "of planes", "none")
                continue
            basis, score = method.stage(Basis), method.stage(Score)
            budgets, training = method.stage(Budgets), method.stage(Training)
            exponents = "searched" if score.start else f"{score.exponent:g}"
            words = "magnitudes" if score.gains == "norms" and exponents == "0" else by[score.gains]
            shown = f"{name}\n(default)" if name == DEFAULT else name
            biases = "trained" if training.biases else "none"
            table.add_row(shown, basis.kind, words, exponents, budgets.allocator.name, biases)
        show = console()
        show.print(table)
        for method in METHODS.values():
            show.print(f"{method.name}: {method.summary}", highlight=False)
