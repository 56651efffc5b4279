"""One launch of the kernel: on a GPU through Mosaic, or simulated in NumPy."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.fused_block.body import Block
from kernels_pallas.fused_block.layout import FusedConfig, FusedShape, most_splits, products, room, tasks
from kernels_pallas.lanes.simulated import Simulated

WARPGROUP = 128
COUNTED = 7  # rows of the counts: o, gate, up, down, q, k, v


def outputs(shape: FusedShape, config: FusedConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """What a launch makes beside the exchange."""
    made = {
        "new_x": jax.ShapeDtypeStruct((1, shape.hidden), jnp.bfloat16),
        "counts": jax.ShapeDtypeStruct((COUNTED, most_splits(shape, config)), jnp.int32),
    }
    for name, size in zip("qkv", shape.sizes_next, strict=False):
        splits = products(shape, config)["attn_in"].splits
        made[f"new_{name}"] = jax.ShapeDtypeStruct((splits, 1, size), jnp.float32)
    return made


def exchange_shape(shape: FusedShape, config: FusedConfig) -> tuple[int, int]:
    """Posts, of a float's bits and a tag each."""
    return room(shape, config).posts, 2


@functools.partial(jax.jit, static_argnames=("shape", "config"))
def launch_mosaic(inputs: Mapping[str, jax.Array], exchange: jax.Array, shape: FusedShape, config: FusedConfig) -> Any:
    """The outputs by name, and the exchange, which keeps its memory.

    Args:
        inputs: every array that the body reads, by name.
        exchange: int32 `[posts, 2]`, without a post of this launch's tag.
        shape: of the block.
        config: how the work is shared.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from kernels_pallas.lanes.mosaic import Mosaic

    inputs = dict(inputs) | {"tasks": jnp.asarray(tasks(shape, config))}
    names, made = list(inputs), outputs(shape, config)
    arrays = [*names, "exchange", *made]

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def emit(_: Any, *refs: Any) -> None:
            m = Mosaic(config.threads)
            at = {name: m.device(ref) for name, ref in zip(arrays, refs[:-1], strict=True)}
            Block(m, shape, config, at, m.shared(refs[-1])).run()

        emit(*refs)

    body.__name__ = f"fused_block_{shape.hidden}x{shape.intermediate}"
    call = plgpu.kernel(
        body,
        out_type=tuple(made.values()),
        grid=(config.blocks,),
        grid_names=("block",),
        num_threads=config.threads // WARPGROUP,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((room(shape, config).shared // 4,), jnp.int32)],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )
    # As a reference, the kernel may change it where it is.
    changed = jax.new_ref(exchange)
    found = call(*inputs.values(), changed)
    return dict(zip(made, found, strict=True)), jax.freeze(changed)


@functools.partial(jax.jit, static_argnames=("shape", "config"))
def launch_simulated(
    inputs: Mapping[str, jax.Array], exchange: jax.Array, shape: FusedShape, config: FusedConfig
) -> Any:
    """The same in NumPy, on the host."""
    inputs = dict(inputs) | {"tasks": jnp.asarray(tasks(shape, config))}
    names, made = list(inputs), outputs(shape, config)

    def run(exchange: Any, *inputs: Any) -> Any:
        host = [np.asarray(a) for a in (*inputs, exchange)]
        host += [np.full(o.shape, -77).astype(o.dtype) for o in made.values()]
        machine = Simulated(config.blocks, config.threads, host, room(shape, config).shared)
        at = {name: machine.device(i) for i, name in enumerate([*names, "exchange", *made])}
        Block(machine, shape, config, at, machine.shared(0)).run()
        found = {name: machine.array(len(names) + 1 + i, host[len(names) + 1 + i]) for i, name in enumerate(made)}
        return found, machine.array(len(names), host[len(names)])

    types = (made, jax.ShapeDtypeStruct(exchange.shape, jnp.int32))
    return jax.pure_callback(run, types, exchange, *inputs.values())
