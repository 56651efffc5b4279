"""`wisparse report`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from wisparse_jax.errors import WisparseError


@dataclasses.dataclass(frozen=True)
class Report:
    """Draw plans: one HTML page that opens without a network, and its figures as PNG files."""

    plans: Positional[tuple[Path, ...]]
    """Plan folders; several stand side by side."""
    out: Path
    """Folder to write; it must not exist."""
    title: str = "Sparsity plans"
    """Of the page."""

    def run(self) -> None:
        """Read, draw, write."""
        from wisparse_jax.report.page import write_report
        from wisparse_jax.sparsity import SparsityPlan

        plans: dict[str, SparsityPlan] = {}
        for path in self.plans:
            # By the name of the folder, or its whole path where two have the same.
            name = path.resolve().name if path.name != "plan.json" else path.resolve().parent.name
            name = str(path) if name in plans else name
            if name in plans:
                raise WisparseError(f"{path}: named twice")
            plans[name] = SparsityPlan.load(path)
        print(write_report(plans, self.out, self.title))
