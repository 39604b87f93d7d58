"""`python -m lmjax.plan.child FOLDER DEVICES < config.json`: compiles a step for CPU devices.

The process simulates that many devices. Nothing is allocated, and compile time does not depend on
the depth of the model, because blocks are scanned. The step is traced as for an accelerator. XLA
dumps the partitioned program into the folder; the fields of a `Memory` go to stdout as JSON.

Knows configs, the train step and JAX.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Final

import jax
import jax.numpy as jnp

from lmjax import strict_json
from lmjax.parallel import sharding
from lmjax.plan.program import Memory
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


def compile_here(config: Config, folder: str) -> Memory:
    """Compiles the step for all devices of this process; XLA dumps the program into a folder."""
    phase, mesh = phase_of(config), sharding.make_mesh(config.mesh)
    shape = (config.batch_size, config.context)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh, shape))
    batch = dict.fromkeys(config.data.batch_fields, tokens)
    with planned_for(Backend(PLATFORM)):
        traced = make_train_step(phase, mesh).trace(abstract_state(phase, mesh), batch)
        lowered = traced.lower(lowering_platforms=(PLATFORM,))
    options = {**OPTIONS, "xla_dump_to": folder}
    needs = lowered.compile(compiler_options=options).memory_analysis()
    return Memory(needs.argument_size_in_bytes, needs.temp_size_in_bytes)


def main() -> None:
    """See the module docstring."""
    folder, devices = sys.argv[1], int(sys.argv[2])
    jax.config.update("jax_num_cpu_devices", devices)
    config = from_json(strict_json.loads(sys.stdin.read()))
    print(strict_json.dumps(dataclasses.asdict(compile_here(config, folder))))


if __name__ == "__main__":
    main()
