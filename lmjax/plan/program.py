"""Compiles a run's train step, as XLA partitions it for devices that need not exist.

A separate process, `child.py`, compiles it. The program is read after XLA's partitioner, which all
backends share, and before CPU-specific passes, which widen bf16 products and the arrays gathered
for them.

Knows configs and the sizes of meshes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lmjax import strict_json
from lmjax.console import stages
from lmjax.console.wording import counted
from lmjax.parallel import sharding
from lmjax.runs.config import to_json
from lmjax.train import Config

CHILD = "lmjax.plan.child"
DUMPED = "*jit_step*after_spmd-partitioning.before*.txt"


class PlanError(RuntimeError):
    """XLA could not compile the step for these devices."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, as XLA's CPU compiler allocates them.

    Attributes:
      arguments: the train state and the batch; the state is updated in place.
      temporaries: peak of everything else.
    """

    arguments: int
    temporaries: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.arguments + self.temporaries


@dataclass(frozen=True)
class Program:
    """A compiled train step.

    Attributes:
      text: HLO of one device's program, after the partitioner; empty for a single device.
      memory: the memory that it needs.
      warnings: the partitioner's warnings about tensors that it could reshard only by replicating
        them on every device first.
    """

    text: str
    memory: Memory
    warnings: tuple[str, ...]


def partitioned(config: Config, devices: int) -> Program:
    """Compiles the train step of a run for a number of devices.

    Args:
      config: the run; its policy must have one phase.
      devices: number of devices.

    Raises:
      ValueError: the mesh does not fit the devices, or the batch does not fit the mesh.
      PlanError: XLA cannot compile it.
    """
    config = config.resolved()
    parts = sharding.batch_parts(sharding.abstract_mesh(config.mesh, devices))
    rows = config.batch_size // config.micro_batches
    if rows % parts:
        raise ValueError(
            f"a micro-batch of {rows} rows cannot be divided among {parts} devices (mesh.data x "
            "mesh.fsdp); raise --batch-size, lower --micro-batches, or raise --mesh.tensor"
        )
    with tempfile.TemporaryDirectory() as folder:
        with stages.stage(f"compiling the train step for {counted(devices, 'device')}"):
            done = subprocess.run(
                [sys.executable, "-m", CHILD, folder, str(devices)],
                input=strict_json.dumps(to_json(config)),
                env=_environment(),
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise PlanError(f"the step could not be compiled for {devices} devices: {last[0]}")
        memory = Memory(**strict_json.loads(done.stdout.splitlines()[-1]))
        if devices == 1:  # nothing is partitioned or sent
            return Program("", memory, ())
        (dump,) = Path(folder).glob(DUMPED)
        return Program(dump.read_text("utf-8"), memory, _complaints(done.stderr))


def _environment() -> dict[str, str]:
    """The environment of a process that compiles on CPU only, without flags or caches."""
    own = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "XLA_FLAGS": "",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    return {**os.environ, **own}


def _complaints(stderr: str) -> tuple[str, ...]:
    pattern = r"Involuntary full rematerialization.*?for HLO operation %(\S+ = \S+)"
    return tuple(re.findall(pattern, stderr))
