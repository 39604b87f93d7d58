"""`python -m lmjax.plan.child FOLDER DEVICES|TARGET < config.json`: compiles a train step.

For a number of devices, the process simulates that many CPU devices; the step is traced as for an
accelerator, and XLA dumps the partitioned program into the folder. For a target such as `h100:8`,
the compiler of these chips compiles it, and the program goes into the folder. Nothing is allocated,
and compile time hardly depends on the depth of the model, because blocks are scanned. What was
learnt goes to stdout as a line of JSON.

Knows configs, the train step, targets and JAX.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp

from lmjax import strict_json
from lmjax.parallel import sharding
from lmjax.plan.program import PROGRAM, REFUSED, needed_memory
from lmjax.plan.targets import Target, parse_target, topology_devices
from lmjax.precision import exact
from lmjax.precision.backend import Backend, planned_for
from lmjax.runs.config import from_json
from lmjax.train import Config, abstract_state, make_train_step, phase_of

PLATFORM: Final = "tpu"
"""The platform to trace for: it calls no libraries that the CPU compiler lacks."""

OPTIONS: Final[dict[str, Any]] = {
    **exact.COMPILER_OPTIONS,
    "xla_dump_hlo_pass_re": "spmd-partitioning",
    "xla_dump_hlo_as_text": True,
    "xla_backend_optimization_level": 0,  # the machine code is not used
}


def lowered(config: Config, mesh: sharding.Mesh, platform: str) -> tuple[jax.stages.Lowered, int]:
    """The step of a config on a mesh for a JAX platform; and bytes of a device's arguments."""
    phase = phase_of(config)
    shapes = config.data.batch_shapes(config.batch_size, config.context)
    placed = lambda shape: jax.ShapeDtypeStruct(
        shape, jnp.int32, sharding=sharding.batch_sharding(mesh, shape)
    )
    batch = {name: placed(shape) for name, shape in shapes.items()}
    arguments = abstract_state(phase, mesh), batch
    traced = make_train_step(phase, mesh).trace(*arguments)
    size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return traced.lower(lowering_platforms=(platform,)), sum(map(size, jax.tree.leaves(arguments)))


def compile_here(config: Config, devices: int, folder: str) -> dict[str, Any]:
    """Compiles the step for devices of this process; XLA dumps the program into a folder."""
    jax.config.update("jax_num_cpu_devices", devices)
    with planned_for(Backend(PLATFORM)):
        program, _ = lowered(config, sharding.make_mesh(config.mesh), PLATFORM)
    options = {**OPTIONS, "xla_dump_to": folder}
    return {"memory": _memory(program.compile(compiler_options=options))}


def compile_for_chips(config: Config, target: Target, folder: str) -> dict[str, Any]:
    """Compiles the step with the compiler of the chips and writes its text into a folder.

    Without a text, the step does not fit; without its memory, it cannot be compiled.
    """
    mesh = sharding.make_mesh(config.mesh, topology_devices(target))
    platform = {"gpu": "cuda"}.get(target.backend.platform, target.backend.platform)
    program, arguments = lowered(config, mesh, platform)
    start = time.monotonic()
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        temporaries = needed_memory(str(error))
        if temporaries is None:
            return {REFUSED: str(error).splitlines()[0]}
        return {"memory": {"arguments": arguments, "temporaries": temporaries}}
    seconds = time.monotonic() - start
    Path(folder, PROGRAM).write_text(compiled.as_text() or "", "utf-8")
    return {"memory": _memory(compiled), "seconds": seconds}


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    needs: Any = compiled.memory_analysis()
    return {
        "arguments": needs.argument_size_in_bytes,
        "temporaries": needs.temp_size_in_bytes,
        "results": needs.output_size_in_bytes - needs.alias_size_in_bytes,
    }


def main() -> None:
    """See the module docstring."""
    folder, where = sys.argv[1:]
    config = from_json(strict_json.loads(sys.stdin.read()))
    if where.isdigit():
        found = compile_here(config, int(where), folder)
    else:
        found = compile_for_chips(config, parse_target(where), folder)
    print(strict_json.dumps(found))


if __name__ == "__main__":
    main()
