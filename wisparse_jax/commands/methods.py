"""`wisparse methods`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Methods:
    """List the methods, and what each is made of."""

    def run(self) -> None:
        """Print the table."""
        from rich.table import Table

        from wisparse_jax.report.tables import console
        from wisparse_jax.sparsity.methods import DEFAULT, METHODS

        # Just within 80 columns; the words of each stand below.
        table = Table("method", "basis", "score", "exponents", "budgets", "biases", title="methods")
        for method in METHODS.values():
            exponents = "searched" if method.search_exponents else f"{method.exponent:g}"
            by = {"norms": "weight norms", "gradients": "gradients", "trained": "gradients,\nthen trained"}
            score = "magnitudes" if method.gains == "norms" and exponents == "0" else by[method.gains]
            name = f"{method.name}\n(default)" if method.name == DEFAULT else method.name
            biases = "trained" if method.biases else "none"
            table.add_row(name, method.basis, score, exponents, method.allocator, biases)
        show = console()
        show.print(table)
        for method in METHODS.values():
            show.print(f"{method.name}: {method.summary}", highlight=False)
