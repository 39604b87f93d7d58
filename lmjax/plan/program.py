"""Compiles a run's train step for devices that may be absent.

A separate process, `child.py`, compiles it: for any number of devices on the CPU, of which the
program is read after XLA's partitioner, which all backends share, and before CPU-specific passes,
which widen bf16 products and the arrays gathered for them; or for chips with their own compiler.

Knows configs, targets and the sizes of meshes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmjax import strict_json
from lmjax.console import stages
from lmjax.console.wording import counted
from lmjax.parallel import sharding
from lmjax.plan.targets import Target
from lmjax.runs.config import to_json
from lmjax.runs.resolved import resolve
from lmjax.runs.state import refuse_stored
from lmjax.train import Config

CHILD = "lmjax.plan.child"
PROGRAM, REFUSED = "program.txt", "refused"
DUMPED = "*jit_step*after_spmd-partitioning.before*.txt"


class PlanError(RuntimeError):
    """XLA could not compile the step for these devices."""


class DoesNotFit(PlanError):
    """The compiler found that the step needs more memory than a device has.

    Attributes:
      memory: what the step needs, of which the compiler only counts temporaries.
    """

    def __init__(self, message: str, memory: Memory) -> None:
        super().__init__(message)
        self.memory = memory


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, as a compiler allocates them.

    Attributes:
      arguments: the train state and the batch; the state is updated in place.
      temporaries: peak of everything else.
      results: what is returned beside the state.
    """

    arguments: int
    temporaries: int
    results: int = 0

    @property
    def peak(self) -> int:
        """All of it."""
        return self.arguments + self.temporaries + self.results


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


@dataclass(frozen=True)
class Compiled:
    """A train step, compiled by the compiler of the chips that it is for.

    Attributes:
      target: the chips.
      text: HLO of one device's program, as it runs.
      memory: the memory that it needs.
      seconds: that the compiler took.
      compiler: its name and version.
    """

    target: Target
    text: str
    memory: Memory
    seconds: float
    compiler: str


def partitioned(config: Config, devices: int) -> Program:
    """Compiles the train step of a run for a number of devices, as XLA partitions it.

    Args:
      config: the run; its policy must have one phase.
      devices: number of devices.

    Raises:
      ValueError: the mesh does not fit the devices, or the batch does not fit the mesh.
      PlanError: XLA cannot compile it.
    """
    config = config.resolved()
    check_division(config, devices)
    with tempfile.TemporaryDirectory() as folder:
        found, stderr = _child(config, str(devices), counted(devices, "device"), folder)
        memory = Memory(**found["memory"])
        if devices == 1:  # nothing is partitioned or sent
            return Program("", memory, ())
        (dump,) = Path(folder).glob(DUMPED)
        return Program(dump.read_text("utf-8"), memory, _complaints(stderr))


def compiled_for(config: Config, target: Target) -> Compiled:
    """Compiles the train step of a run with the compiler of chips that this machine may lack.

    Args:
      config: the run; its policy must have one phase.
      target: the chips, from `parse_target`.

    Raises:
      ValueError: the compiler is not installed, the mesh does not fit the devices, or the batch
        does not fit the mesh.
      DoesNotFit: the step needs more memory than a device has, where the compiler refuses that;
        GPUs' does not.
      PlanError: the step cannot be compiled for another reason.
    """
    config, compiler = config.resolved(), target.compiler
    if compiler is None:
        raise ValueError(
            f"compiling for {target.title} needs {target.packages[0]}, which is not installed; "
            f"install it with: pip install -c constraints.txt -e '.[{target.extra}]'"
        )
    check_division(config, target.devices)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found, _ = _child(config, target.name, target.name, folder)
        except PlanError as error:
            if not target.mismatch:
                raise
            raise PlanError(f"{error}\n{target.mismatch}") from error
        memory = Memory(**found["memory"])
        if not Path(folder, PROGRAM).exists():
            needs, has = memory.peak / 1e9, target.memory / 1e9
            raise DoesNotFit(
                f"the step needs {needs:.3g} GB on each {target.title}, which has {has:.3g} GB",
                memory,
            )
        text = Path(folder, PROGRAM).read_text("utf-8")
        return Compiled(target, text, memory, found["seconds"], compiler)


def check_division(config: Config, devices: int) -> None:
    """Rejects a batch that the mesh cannot divide, and weights that are not trained.

    Raises:
      ValueError: says what to change.
    """
    for phase in resolve(config).phases:
        refuse_stored(phase)
    parts = sharding.batch_parts(sharding.abstract_mesh(config.mesh, devices))
    rows = config.batch_size // config.micro_batches
    if rows % parts:
        raise ValueError(
            f"a micro-batch of {rows} rows cannot be divided among {parts} devices (mesh.data x "
            "mesh.fsdp); raise --batch-size, lower --micro-batches, or raise --mesh.tensor"
        )


def needed_memory(message: str) -> int | None:
    """Bytes of temporaries of a step, if a compiler says in this message that they do not fit."""
    used = re.search(r"(?:HLO temporaries \(|hbm\. Used )([\d.]+)([KMGT])", message)
    if used is None:
        return None
    return round(float(used[1]) * 2.0 ** (10 * (1 + "KMGT".index(used[2]))))


def _child(config: Config, where: str, named: str, folder: str) -> tuple[dict[str, Any], str]:
    """What the compiling process says about a step, and its messages."""
    with stages.stage(f"compiling the train step for {named}"):
        done = subprocess.run(
            [sys.executable, "-m", CHILD, folder, where],
            input=strict_json.dumps(to_json(config)),
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
    found = strict_json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {}
    if "memory" not in found:
        last = [found[REFUSED]] if found else done.stderr.strip().splitlines()[-1:]
        said = last[0] if last else "no message"
        raise PlanError(f"the step could not be compiled for {named}: {said}")
    return found, done.stderr


def _environment() -> dict[str, str]:
    """The environment of a process that compiles on CPU only, without flags or caches."""
    own = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise a lock file admits one process
        "XLA_FLAGS": "",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    return {**os.environ, **own}


def _complaints(stderr: str) -> tuple[str, ...]:
    pattern = r"Involuntary full rematerialization.*?for HLO operation %(\S+ = \S+)"
    return tuple(re.findall(pattern, stderr))
