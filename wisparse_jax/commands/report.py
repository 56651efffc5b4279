"""`wisparse report`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional


@dataclasses.dataclass(frozen=True)
class Report:
    """Draw plans: one HTML page that opens without a network, and its figures as PNG files."""

    plans: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="PLAN [PLAN ...]", help_behavior_hint="")]
    """Plan folders or hub ids; several stand side by side."""
    out: Path
    """Folder to write; it must not exist."""
    title: str = "Sparsity plans"
    """Of the page."""

    def run(self) -> None:
        """Read the plans, draw them and write the page."""
        from wisparse_jax.commands.plans import named_plans
        from wisparse_jax.report.page import write_report

        print(write_report(named_plans(self.plans), self.out, self.title))
