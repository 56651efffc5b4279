"""`wisparse demo`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from wisparse_jax.commands.options import Unset


@dataclasses.dataclass(frozen=True)
class Demo:
    """Make the packaged model 50 % sparse by every method, compare them, and let it write."""

    out: Unset[Path | None] = None
    """Folder for the plans and figures; by default a new one under runs/."""

    def run(self) -> None:
        """Run the demo."""
        from wisparse_jax.report.demo import run_demo

        run_demo(self.out)
