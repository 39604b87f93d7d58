"""Several processes that train together: how they find each other, and how they end.

A run takes one process a host, or one an accelerator, all started with the same command. Where the
environment says who is who, nothing has to be said; else the flags below say it. What the processes
do together is ordinary JAX from there on: `jax.devices()` are those of all of them.

One that is lost takes the others down instead of leaving them in a collective that never ends:
backends notice a closed connection at once, JAX's coordination service a process that has been
silent for `HEARTBEAT_SECONDS`. That service ends its clients by abort(), which has neither an exit
code of its own nor a message for people; `start` sees to both.

Knows JAX, the variables that launchers set, and how fields are checked.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import jax
from jax.experimental import multihost_utils

from lmjax.checks import at_least, validate

HEARTBEAT_SECONDS = 30
"""Silence after which a process counts as lost."""

SHUTDOWN_SECONDS = 60
"""How long a process that is done waits for the others to be done."""

Cluster = Literal["auto", "none", "torchrun", "slurm", "openmpi", "kubernetes", "tpu", "mpi4py"]


@dataclass(frozen=True)
class DistributedConfig:
    """How this process finds the others: part of a launch, not of what the run computes."""

    coordinator: str | None = None
    """HOST:PORT at which all can reach process 0; any port that is free there."""
    processes: Annotated[int, at_least(1)] | None = None
    """How many processes train together."""
    process: Annotated[int, at_least(0)] | None = None
    """Which of them this is, counted from 0."""
    cluster: Cluster = "auto"
    """Who says what is not given above. auto: torchrun, Slurm or Open MPI, if their variables say
    that several processes were started; otherwise this is the only one. kubernetes, tpu and mpi4py:
    JAX's own detection. none: nobody."""
    timeout: Annotated[int, at_least(1)] = 300
    """Seconds to wait at the start until all processes are there."""

    def __post_init__(self) -> None:
        """Refuses what can be no process."""
        validate(self, "distributed")
        if self.coordinator is not None and not re.fullmatch(r".+:\d+", self.coordinator):
            raise ValueError(
                f"distributed.coordinator is {self.coordinator!r}; it must be HOST:PORT"
            )
        if self.process is not None and self.process >= (self.processes or math.inf):
            raise ValueError(
                f"distributed.process is {self.process}; it must be less than "
                f"distributed.processes, {self.processes}"
            )


class Place(NamedTuple):
    """Which process this is among how many, as far as it is known without asking anyone.

    Attributes:
      coordinator: HOST:PORT of process 0.
      processes: how many there are.
      process: which one this is.
      devices: the accelerators of this host that it uses; None: all that it sees.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    devices: list[int] | None = None


def find_place(config: DistributedConfig, environment: Mapping[str, str]) -> Place | None:
    """What the flags say and, where they say nothing, the environment.

    Returns:
      The place of this process, complete unless JAX is to find the rest; None: it is alone.

    Raises:
      ValueError: neither says enough.
    """
    found = _found(config, environment)
    given = (config.coordinator, config.processes, config.process)
    if found is None and given == (None, None, None) and config.cluster not in FOUND_BY_JAX:
        return None
    found = found or Place()
    place = Place(
        config.coordinator or found.coordinator,
        config.processes or found.processes,
        found.process if config.process is None else config.process,
        None if "JAX_LOCAL_DEVICE_IDS" in environment else found.devices,
    )
    missing = [
        f"--distributed.{name}" for name in place._fields[:3] if getattr(place, name) is None
    ]
    if missing and config.cluster not in FOUND_BY_JAX:
        raise ValueError(
            f"give {' and '.join(missing)} too: neither the other flags nor the variables of a "
            "launcher say it"
        )
    return None if place.processes == 1 else place


def _found(config: DistributedConfig, environment: Mapping[str, str]) -> Place | None:
    if config.cluster in LAUNCHERS:
        found = LAUNCHERS[config.cluster](environment)
        if found is None:
            raise ValueError(
                f"distributed.cluster is {config.cluster}, but its variables are not in the "
                "environment; start this by that launcher, or use another --distributed.cluster"
            )
        return found
    if config.cluster != "auto":
        return None
    launched = [find(environment) for find in LAUNCHERS.values()]
    # A shell inside an allocation is one task, and waits for nobody.
    return next((place for place in launched if place and place.processes != 1), None)


def _torchrun(environment: Mapping[str, str]) -> Place | None:
    """The variables of torchrun and its like."""
    if not {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"} <= environment.keys():
        return None
    # torchrun itself may be listening at the port that it names.
    taken = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port = environment.get("JAX_COORDINATOR_PORT", int(environment["MASTER_PORT"]) + taken)
    return Place(
        f"{environment['MASTER_ADDR']}:{port}",
        int(environment["WORLD_SIZE"]),
        int(environment["RANK"]),
        _own_devices(
            environment,
            int(environment.get("LOCAL_RANK", 0)),
            int(environment.get("LOCAL_WORLD_SIZE", 1)),
        ),
    )


def _slurm(environment: Mapping[str, str]) -> Place | None:
    """A task of a step that srun has started.

    Not `SLURM_NTASKS`, which JAX counts: in an interactive shell that is what an srun would start.
    """
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= environment.keys():
        return None
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
    first = re.match(r"([^,\[]+)(?:\[([^],-]+))?", environment["SLURM_STEP_NODELIST"])
    assert first is not None
    # Two steps of a job may run at once on the same node.
    number = int(environment["SLURM_JOB_ID"]) + int(environment.get("SLURM_STEP_ID", 0))
    return Place(
        f"{first[1]}{first[2] or ''}:{_port(environment, number)}",
        tasks,
        int(environment["SLURM_PROCID"]),
        _own_devices(environment, int(environment.get("SLURM_LOCALID", 0)), -(-tasks // nodes)),
    )


def _openmpi(environment: Mapping[str, str]) -> Place | None:
    """A process that mpirun has started; only before version 5 it says where the first one is."""
    if not {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"} <= environment.keys():
        return None
    launcher = re.match(
        r"(\d+).*?(?:tcp://([^,:]+)|tcp6://(\[[^],]+))",
        environment.get("OMPI_MCA_orte_hnp_uri", ""),
    )
    coordinator = None
    if launcher is not None:
        host = launcher[2] or launcher[3] + "]"
        # Numbers of jobs are multiples of 2^12.
        coordinator = f"{host}:{_port(environment, int(launcher[1]) >> 12)}"
    return Place(
        coordinator,
        int(environment["OMPI_COMM_WORLD_SIZE"]),
        int(environment["OMPI_COMM_WORLD_RANK"]),
        _own_devices(
            environment,
            int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", 0)),
            int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)),
        ),
    )


LAUNCHERS: dict[str, Callable[[Mapping[str, str]], Place | None]] = {
    "torchrun": _torchrun,
    "slurm": _slurm,
    "openmpi": _openmpi,
}
"""Read here, in this order, and not by JAX: it waits in an interactive shell of Slurm for tasks
that nobody started, gives each task one GPU even alone on its host, and does not know torchrun."""

FOUND_BY_JAX = ("kubernetes", "tpu", "mpi4py")
"""On request alone: what these need to know takes questions over a network, or MPI."""


def _port(environment: Mapping[str, str], number: int) -> str:
    """A port of the upper end of the range, the same in all processes of a job."""
    return environment.get("JAX_COORDINATOR_PORT", str(2**16 - 2**12 + number % 2**12))


def _own_devices(environment: Mapping[str, str], rank: int, processes: int) -> list[int] | None:
    """One GPU for each of several processes on a host, unless the launcher has divided them."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    divided = visible is not None and len(visible.split(",")) < processes
    return None if processes == 1 or divided else [rank]


def start(config: DistributedConfig) -> bool:
    """Joins this process with the others, if there are any; before anything uses a device.

    Returns:
      Whether there are any.

    Raises:
      ValueError: flags and environment do not say enough, or process 0 cannot use its port. Others
        that do not come in time end this process by abort(), which see below.
    """
    place = find_place(config, os.environ)
    if place is None:
        return False
    # JAX would take SIGTERM for itself; how stops are agreed on says parallel/agreement.py.
    jax.config.update("jax_enable_preemption_service", False)
    _explain_aborts()
    try:
        jax.distributed.initialize(
            coordinator_address=place.coordinator,
            num_processes=place.processes,
            process_id=place.process,
            local_device_ids=place.devices,
            cluster_detection_method=_detection(config.cluster),
            initialization_timeout=config.timeout,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except RuntimeError as error:
        raise ValueError(
            f"the processes cannot be joined at {place.coordinator or 'the first one'}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    # Links on CPU are made when first used, and then within 30 seconds: before processes part ways.
    multihost_utils.sync_global_devices("start")
    return True


def _detection(cluster: Cluster) -> str | None:
    """What JAX may find out by itself; None: it tries what it knows."""
    if cluster in FOUND_BY_JAX:
        return "mpi4py" if cluster == "mpi4py" else None
    return "deactivate"


def started() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized()


def is_of_the_backend(error: BaseException) -> bool:
    """Whether an error comes from a computation, as that of a collective with a lost process does.

    Some of those of Gloo, which connects CPUs, arrive as ValueErrors.
    """
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def explained(error: BaseException) -> str:
    """What an error means that has ended one of several processes, in a line."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"process {jax.process_index()} of {jax.process_count()} ends: {text}. If another one is "
        "lost, see what that one says; the same command in all of them goes on from the newest "
        "checkpoint"
    )


def leave_at_once(code: int) -> None:
    """Ends this process, if it has joined others, without waiting for them.

    For one that has failed alone: the others are in a collective that it will not come to. They
    notice that it is gone.
    """
    if started():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _explain_abort(number: int) -> None:
    """What abort() does in a process that has joined others."""
    os.write(
        2,
        b"error: JAX has ended this process, with the message above; most likely another process "
        b"is lost or has not come, see what that one says. The same command in all of them goes on "
        b"from the newest checkpoint\n",
    )
    os._exit(1)


def _explain_aborts() -> None:
    """Makes abort() end this process with exit code 1 and a line that says what has happened.

    JAX's client takes a callback for that, but none from Python: the status that it is called with
    has no Python type. Nor does a handler of Python's own `signal` run before the process is gone.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).signal(int(signal.SIGABRT), _explain_abort)
