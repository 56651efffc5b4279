"""Several processes, on one host or on many, that run one program together by `jax.distributed`."""

from __future__ import annotations

from wisparse_jax.errors import WisparseError, first_line


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join the other processes; before anything of JAX runs. What is None JAX asks the cluster (Slurm, MPI, TPU, ...).

    Afterwards `jax.devices()` are those of all processes, and every process runs the same program on the same input.

    Args:
        coordinator: HOST:PORT of the first process, which all can reach.
        processes: how many there are.
        process: the number of this one, from 0.

    Raises:
        WisparseError: JAX cannot find out what is None, or the processes do not find each other.
    """
    import jax

    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise WisparseError(f"distributed: the processes cannot be joined: {reason}") from None


def is_first() -> bool:
    """Whether this process is the one that prints and writes; where there is one process, it is."""
    import jax

    return jax.process_index() == 0


def part() -> None:
    """Leave the other processes once all of them are done; without others nothing happens."""
    import jax

    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
