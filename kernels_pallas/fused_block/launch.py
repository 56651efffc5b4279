"""One launch of the kernel: on a GPU through Mosaic, or simulated in NumPy."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.fused_block.kernel import Kernel
from kernels_pallas.fused_block.memory_layout import memory_layout
from kernels_pallas.fused_block.tasks import tasks
from kernels_pallas.fused_block.tiling import COUNTS, FusedConfig, FusedShape, most_splits
from kernels_pallas.lanes.simulated import Simulated

WARPGROUP = 128
Arrays = Mapping[str, jax.Array]
Made = tuple[dict[str, jax.Array], dict[str, jax.Array]]


def outputs(shape: FusedShape, config: FusedConfig, depth: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of the arrays that a launch writes."""
    return {
        "new_x": jax.ShapeDtypeStruct((1, shape.hidden), jnp.bfloat16),
        "counts": jax.ShapeDtypeStruct((depth, COUNTS * shape.planes, most_splits(shape, config)), jnp.int32),
    }


def exchange_shape(shape: FusedShape, config: FusedConfig) -> tuple[int, int]:
    """Mailboxes, of a word and a flag each."""
    return memory_layout(shape, config).mailboxes, 2


@functools.partial(jax.jit, static_argnames=("shape", "config", "depth"))
def launch_mosaic(inputs: Arrays, changed: Arrays, shape: FusedShape, config: FusedConfig, depth: int) -> Made:
    """The outputs by name, and what the kernel changed, which keeps its memory.

    Args:
        inputs: every array that the body reads, by name; of a decoder block, with its number behind it.
        changed: the exchange, without any of this launch's flags in it, and the keys and values of each decoder block.
        shape: of a decoder block.
        config: how the work is shared.
        depth: decoder blocks.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from kernels_pallas.lanes.mosaic import Mosaic

    inputs = dict(inputs) | {"tasks": jnp.asarray(tasks(shape, config))}
    made = outputs(shape, config, depth)
    arrays = [*inputs, *changed, *made]

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def emit(_: Any, *refs: Any) -> None:
            m = Mosaic(config.threads)
            at = {name: m.device(ref) for name, ref in zip(arrays, refs[:-1], strict=True)}
            Kernel(m, shape, config, depth, at, m.shared(refs[-1])).run()

        emit(*refs)

    body.__name__ = f"fused_block_{shape.hidden}x{shape.intermediate}_{depth}"
    call = plgpu.kernel(
        body,
        out_type=tuple(made.values()),
        grid=(config.ctas,),
        grid_names=("block",),
        num_threads=config.threads // WARPGROUP,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((memory_layout(shape, config).shared // 4,), jnp.int32)],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )
    # As references, the kernel may change them where they are.
    refs = {name: jax.new_ref(array) for name, array in changed.items()}
    found = call(*inputs.values(), *refs.values())
    return dict(zip(made, found, strict=True)), {name: jax.freeze(ref) for name, ref in refs.items()}


@functools.partial(jax.jit, static_argnames=("shape", "config", "depth"))
def launch_simulated(inputs: Arrays, changed: Arrays, shape: FusedShape, config: FusedConfig, depth: int) -> Made:
    """The same in NumPy, on the host."""
    inputs = dict(inputs) | {"tasks": jnp.asarray(tasks(shape, config))}
    made = outputs(shape, config, depth)
    given = dict(inputs) | dict(changed)

    def run(*arrays: Any) -> Any:
        host = dict(zip(given, map(np.asarray, arrays), strict=True))
        host |= {name: np.full(o.shape, -77).astype(o.dtype) for name, o in made.items()}
        machine = Simulated(config.ctas, config.threads, list(host.values()), memory_layout(shape, config).shared)
        at = {name: machine.device(i) for i, name in enumerate(host)}
        Kernel(machine, shape, config, depth, at, machine.shared(0)).run()
        found = {name: machine.array(i, array) for i, (name, array) in enumerate(host.items())}
        return {name: found[name] for name in made}, {name: found[name] for name in changed}

    same = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in changed.items()}
    return jax.pure_callback(run, (made, same), *given.values())
