"""What the commands that can run on several devices share: the mesh, and how several hosts start."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Annotated

import tyro

from wisparse_jax.commands.options import Unset
from wisparse_jax.errors import WisparseError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """Where a model runs that one device does not hold, or not fast enough."""

    mesh: Unset[str | None] = None
    """Devices that the model is spread over, such as `data=2,model=4`: `model` splits the weights, `data` the batch."""
    coordinator: Unset[str | None] = None
    """HOST:PORT of the first process, where several run one command together; each is given the same."""
    processes: Unset[int | None] = None
    """How many processes run the command together."""
    process: Unset[int | None] = None
    """The number of this one, from 0."""
    distributed: Unset[bool] = False
    """Several processes that a cluster has started: what JAX finds out by itself need not be given."""

    def start(self) -> None:
        """Join the other processes of the command, if there are any; before anything of JAX runs.

        Raises:
            WisparseError: options that do not go together, or processes without a mesh.
        """
        given = {"coordinator": self.coordinator, "processes": self.processes, "process": self.process}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given) and not self.distributed:
            return
        if missing and not self.distributed:
            raise WisparseError(
                f"{missing[0]}: expected --coordinator, --processes and --process together, or --distributed where JAX "
                "can ask the cluster"
            )
        if self.mesh is None:
            raise WisparseError("mesh: expected --mesh, which says how the model lies on the devices of all processes")
        if self.processes is not None and self.process is not None and not 0 <= self.process < self.processes:
            raise WisparseError(f"process = {self.process}: expected 0 to {self.processes - 1}")
        from wisparse_jax.processes import is_first, join

        join(self.coordinator, self.processes, self.process)
        if not is_first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what all would print the first one prints


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnDevices:
    """A command that can run on several devices."""

    devices: Annotated[Devices, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Devices)
