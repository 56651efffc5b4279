"""`wisparse push`."""

from __future__ import annotations

import dataclasses

from tyro.conf import Positional

from wisparse_jax.commands.options import Unset


@dataclasses.dataclass(frozen=True)
class Push:
    """Upload a plan to the hub, with a card of its figures; log in first: `hf auth login`."""

    plan: Positional[str]
    """A plan folder, or a hub id."""
    repository: Positional[str]
    """Where to: `org/name`, which is made if there is none, and is what `--plan org/name` pulls."""
    base_model: Unset[str | None] = None
    """Hub id of the model that the plan is for, for the card; by default the one that it was calibrated as, where that
    was a hub id."""
    private: Unset[bool] = False
    """Of a repository that is made: nobody else sees it."""

    def run(self) -> None:
        """Read, upload, print the address of the commit."""
        from wisparse_jax.sparsity import SparsityPlan
        from wisparse_jax.sparsity.sharing import check_repository

        check_repository(self.repository)
        print(SparsityPlan.load(self.plan).push(self.repository, self.base_model, self.private))
