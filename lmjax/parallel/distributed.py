"""Training in several processes: how they find each other, and how they end.

A run uses one process per host or per accelerator, all started with the same command. Launcher
variables identify the processes where they exist; otherwise use the flags below. From then on it is
ordinary JAX: `jax.devices()` lists the devices of all processes.

A lost process takes the others down instead of leaving them in a collective that never ends:
backends notice a closed connection at once, and JAX's coordination service notices a process that
is silent for `HEARTBEAT_SECONDS`. That service ends its clients with abort(), which has neither a
distinct exit code nor a readable message; `start` provides both.

Knows JAX, launcher variables, and how fields are checked.
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
"""How long a finished process waits for the others to finish."""

Cluster = Literal["auto", "none", "torchrun", "slurm", "openmpi", "kubernetes", "tpu", "mpi4py"]


@dataclass(frozen=True)
class DistributedConfig:
    """How this process finds the others: part of a launch, not of what the run computes."""

    coordinator: str | None = None
    """HOST:PORT of process 0, reachable by all; any free port on its host."""
    processes: Annotated[int, at_least(1)] | None = None
    """Number of processes that train together."""
    process: Annotated[int, at_least(0)] | None = None
    """Index of this process, from 0."""
    cluster: Cluster = "auto"
    """Source of values not given above. auto: torchrun, Slurm or Open MPI, if their variables show
    several processes; otherwise a single process. kubernetes, tpu and mpi4py: JAX's own detection.
    none: no detection."""
    timeout: Annotated[int, at_least(1)] = 300
    """Seconds to wait for all processes at startup."""

    def __post_init__(self) -> None:
        """Rejects invalid process settings."""
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


class ProcessPlace(NamedTuple):
    """The index of this process and the number of processes, as far as known locally.

    Attributes:
      coordinator: HOST:PORT of process 0.
      processes: their number.
      process: the index of this one.
      devices: the accelerators of this host that it uses; None: all visible ones.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    devices: list[int] | None = None


def find_place(config: DistributedConfig, environment: Mapping[str, str]) -> ProcessPlace | None:
    """Combines the flags with the environment; flags take precedence.

    Returns:
      The place of this process, complete unless JAX detects the rest; None: it is alone.

    Raises:
      ValueError: flags and environment together do not say enough.
    """
    found = _found(config, environment)
    given = (config.coordinator, config.processes, config.process)
    if found is None and given == (None, None, None) and config.cluster not in FOUND_BY_JAX:
        return None
    found = found or ProcessPlace()
    place = ProcessPlace(
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
            "launcher set it"
        )
    return None if place.processes == 1 else place


def _found(config: DistributedConfig, environment: Mapping[str, str]) -> ProcessPlace | None:
    if config.cluster in LAUNCHERS:
        found = LAUNCHERS[config.cluster](environment)
        if found is None:
            raise ValueError(
                f"distributed.cluster is {config.cluster}, but its variables are not in the "
                "environment; use that launcher, or choose another --distributed.cluster"
            )
        return found
    if config.cluster != "auto":
        return None
    launched = [find(environment) for find in LAUNCHERS.values()]
    # A shell inside an allocation is a single task and must not wait for others.
    return next((place for place in launched if place and place.processes != 1), None)


def _torchrun(environment: Mapping[str, str]) -> ProcessPlace | None:
    """Reads the variables of torchrun and compatible launchers."""
    if not {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"} <= environment.keys():
        return None
    # torchrun itself may be listening on the port that it names.
    taken = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port = environment.get("JAX_COORDINATOR_PORT", int(environment["MASTER_PORT"]) + taken)
    return ProcessPlace(
        f"{environment['MASTER_ADDR']}:{port}",
        int(environment["WORLD_SIZE"]),
        int(environment["RANK"]),
        _own_devices(
            environment,
            int(environment.get("LOCAL_RANK", 0)),
            int(environment.get("LOCAL_WORLD_SIZE", 1)),
        ),
    )


def _slurm(environment: Mapping[str, str]) -> ProcessPlace | None:
    """Reads the variables of a step that srun has started.

    Not `SLURM_NTASKS`, which JAX uses: in an interactive shell it is the number that srun would
    start.
    """
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= environment.keys():
        return None
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
    first = re.match(r"([^,\[]+)(?:\[([^],-]+))?", environment["SLURM_STEP_NODELIST"])
    assert first is not None
    # Two steps of a job may run on the same node at once.
    number = int(environment["SLURM_JOB_ID"]) + int(environment.get("SLURM_STEP_ID", 0))
    return ProcessPlace(
        f"{first[1]}{first[2] or ''}:{_port(environment, number)}",
        tasks,
        int(environment["SLURM_PROCID"]),
        _own_devices(environment, int(environment.get("SLURM_LOCALID", 0)), -(-tasks // nodes)),
    )


def _openmpi(environment: Mapping[str, str]) -> ProcessPlace | None:
    """Reads the variables of mpirun; only versions before 5 give the host of the first process."""
    if not {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"} <= environment.keys():
        return None
    launcher = re.match(
        r"(\d+).*?(?:tcp://([^,:]+)|tcp6://(\[[^],]+))",
        environment.get("OMPI_MCA_orte_hnp_uri", ""),
    )
    coordinator = None
    if launcher is not None:
        host = launcher[2] or launcher[3] + "]"
        # Job numbers are multiples of 2^12.
        coordinator = f"{host}:{_port(environment, int(launcher[1]) >> 12)}"
    return ProcessPlace(
        coordinator,
        int(environment["OMPI_COMM_WORLD_SIZE"]),
        int(environment["OMPI_COMM_WORLD_RANK"]),
        _own_devices(
            environment,
            int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", 0)),
            int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)),
        ),
    )


LAUNCHERS: dict[str, Callable[[Mapping[str, str]], ProcessPlace | None]] = {
    "torchrun": _torchrun,
    "slurm": _slurm,
    "openmpi": _openmpi,
}
"""Tried in this order instead of JAX's own detection, which in an interactive Slurm shell waits
for tasks never started, gives each task one GPU even alone on its host, and lacks torchrun."""

FOUND_BY_JAX = ("kubernetes", "tpu", "mpi4py")
"""Only on request, because detection needs network requests or MPI."""


def _port(environment: Mapping[str, str], number: int) -> str:
    """A port at the upper end of the range, the same in all processes of a job."""
    return environment.get("JAX_COORDINATOR_PORT", str(2**16 - 2**12 + number % 2**12))


def _own_devices(environment: Mapping[str, str], rank: int, processes: int) -> list[int] | None:
    """One GPU per process where several share a host, unless the launcher has divided them."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    divided = visible is not None and len(visible.split(",")) < processes
    return None if processes == 1 or divided else [rank]


def start(config: DistributedConfig) -> bool:
    """Joins this process with the others, if any; call it before anything uses a device.

    Returns:
      Whether there are others.

    Raises:
      ValueError: flags and environment do not say enough, or process 0 cannot use its port. If
        others do not arrive in time, this process ends by abort(); see `_explain_aborts`.
    """
    place = find_place(config, os.environ)
    if place is None:
        return False
    # JAX would handle SIGTERM itself; parallel/agreement.py agrees on stops instead.
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
    # CPU links are made on first use, within 30 seconds: make them before processes diverge.
    multihost_utils.sync_global_devices("start")
    return True


def _detection(cluster: Cluster) -> str | None:
    """The cluster that JAX may detect; None: any that it knows."""
    if cluster in FOUND_BY_JAX:
        return "mpi4py" if cluster == "mpi4py" else None
    return "deactivate"


def started() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized()


def is_of_the_backend(error: BaseException) -> bool:
    """Whether an error comes from a computation, such as a collective with a lost process.

    Gloo, which connects CPUs, raises some of them as ValueErrors.
    """
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def explained(error: BaseException) -> str:
    """Explains, in one line, an error that ended one of several processes."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"process {jax.process_index()} of {jax.process_count()} ends: {text}. If another one is "
        "lost, see what that one says; the same command in all of them resumes from the newest "
        "checkpoint"
    )


def leave_at_once(code: int) -> None:
    """Ends this process, if it has joined others, without waiting for them.

    For a process that failed alone: the others wait in a collective that it will not reach, and
    notice that it is gone.
    """
    if started():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _explain_abort(number: int) -> None:
    """The abort() handler of a process that has joined others."""
    os.write(
        2,
        b"error: JAX has ended this process, with the message above; most likely another process "
        b"is lost or did not start; see its output. The same command in all of them resumes "
        b"from the newest checkpoint\n",
    )
    os._exit(1)


def _explain_aborts() -> None:
    """Makes abort() end this process with exit code 1 and an explanatory line.

    JAX's client accepts a callback for this, but not from Python: its status argument has no Python
    type. Nor does a handler of Python's own `signal` run before the process is gone.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).signal(int(signal.SIGABRT), _explain_abort)
