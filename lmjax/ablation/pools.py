"""Starts pools of workers, as local processes or as an array of Slurm jobs.

The only file that knows submitit. `worker.py` defines the work itself.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import lmjax
from lmjax.runs.run_directory import InputError


class Failure(NamedTuple):
    """Why a worker stopped unasked: one line, and whether the input was bad."""

    reason: str
    bad_input: bool


class Pool(Protocol):
    """Workers of one ablation, or of several one after another."""

    def alive(self) -> bool:
        """Whether any worker is still running."""

    def failure(self) -> Failure | None:
        """Why a worker ended prematurely, if one did."""

    def stop(self) -> None:
        """Asks all workers to save a checkpoint and exit; returns immediately."""

    def kill(self) -> None:
        """Kills the remaining workers without waiting."""


class LocalPool:
    """Processes of this machine, each with its own XLA threads and a log in `logs/`."""

    def __init__(
        self,
        directory: Path,
        definitions: Sequence[Path],
        processes: int,
        threads: int,
    ):
        (directory / "logs").mkdir(exist_ok=True)
        # Other commands may be at work in this directory, on this machine or another.
        stem = f"{platform.node()}-{os.getpid()}"
        self._logs = [directory / "logs" / f"{stem}-{i}.log" for i in range(processes)]
        arguments = [str(directory), str(threads), *map(str, definitions)]
        self._workers = [_start(arguments, log) for log in self._logs]

    def alive(self) -> bool:
        """Whether any process is running."""
        return any(worker.poll() is None for worker in self._workers)

    def failure(self) -> Failure | None:
        """The last line of the log of a worker that failed, and its exit code in words."""
        for worker, log in zip(self._workers, self._logs, strict=True):
            code = worker.poll()
            if code is not None and code < 0:
                return Failure(f"a worker was ended by {signal.Signals(-code).name}", False)
            if code in (1, 2):
                lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
                last = next((line for line in reversed(lines) if line.strip()), "no reason given")
                return Failure(last if code == 2 else f"{last} (see {log})", code == 2)
        return None

    def stop(self) -> None:
        """Closes what the workers read from."""
        for worker in self._workers:
            if worker.stdin is not None:
                worker.stdin.close()

    def kill(self) -> None:
        """Sends SIGKILL, which also releases the locks; training resumes from checkpoints."""
        for worker, log in zip(self._workers, self._logs, strict=True):
            worker.kill()
            worker.wait()
            if not log.stat().st_size:
                log.unlink()


def _start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    source = str(Path(lmjax.__file__).parents[1])
    search = [source, os.environ.get("PYTHONPATH", "")]
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "lmjax.ablation.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))},
        )


class SlurmPool:
    """An array of Slurm jobs, each a worker. It outlives the command, unless that is stopped.

    Args:
      directory: of the ablation, on a file system that all nodes share.
      definitions: what the ablations are; files that do not change.
      jobs: length of the array.
      threads: cores of each job.
      options: parameters of submitit's `AutoExecutor`, such as `slurm_partition`; `cluster=local`
        runs the jobs on this machine.

    Raises:
      InputError: submitit is not installed, or does not know an option.
    """

    def __init__(
        self,
        directory: Path,
        definitions: Sequence[Path],
        jobs: int,
        threads: int,
        options: Mapping[str, Any],
    ):
        try:
            import submitit
        except ImportError as error:
            raise InputError(
                "Slurm jobs are submitted through submitit; install it: pip install 'lmjax[slurm]'"
            ) from error
        parameters = {"name": "lmjax", "cpus_per_task": threads, "timeout_min": 24 * 60, **options}
        cluster = parameters.pop("cluster", None)
        try:
            executor = submitit.AutoExecutor(folder=directory / "logs", cluster=cluster)
            executor.update_parameters(**parameters)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise InputError(f"submitit cannot submit: {error}") from error
        work = SlurmWorker(directory, definitions, threads)
        with executor.batch():
            self._jobs = [executor.submit(work) for _ in range(jobs)]
        self._queue = _Queue() if executor.cluster == "slurm" else None

    def alive(self) -> bool:
        """Whether any job is queued or running."""
        return not all(self._ended(job) for job in self._jobs)

    def _ended(self, job: Any) -> bool:
        """Whether a job has left its result, or will never leave one.

        submitit asks sacct about that, which many clusters do not have.
        """
        if _has_result(job):
            return True
        return job.done() if self._queue is None else not self._queue.has(job.job_id)

    def failure(self) -> Failure | None:
        """What a job raised; else, that one ended without a word."""
        ended = [job for job in self._jobs if self._ended(job)]
        silent = [job for job in ended if not _has_result(job)]
        for job in ended:
            error = None if job in silent else job.exception()
            if error is not None:
                last = str(error).strip().rpartition("\n")[2]
                return Failure(f"job {job.job_id}: {last} (see {job.paths.stderr})", False)
        if silent:
            return Failure(
                f"job {silent[0].job_id} was ended before its work was (see "
                f"{silent[0].paths.stderr})",
                False,
            )
        return None

    def stop(self) -> None:
        """Cancels the jobs; Slurm lets them save a checkpoint before it kills them."""
        for job in self._jobs:
            job.cancel()

    def kill(self) -> None:
        """Cancels what is left of the jobs; does not wait for Slurm."""
        if self.alive():
            self.stop()


def _has_result(job: Any) -> bool:
    # A listing is fresh where `exists` may remember that there was nothing, as on NFS.
    path = job.paths.result_pickle
    return path.name in os.listdir(path.parent)


class _Queue:
    """Which jobs of this user Slurm has: those that wait, also after a preemption, or run.

    Slurm is asked seldom, because it serves many.
    """

    SECONDS_BETWEEN_QUESTIONS = 10

    def __init__(self) -> None:
        self._asked = float("-inf")
        self._jobs: set[str] | None = None

    def has(self, job: str) -> bool:
        """Whether Slurm had a job when asked last; it counts as there until it has answered."""
        if time.monotonic() - self._asked > self.SECONDS_BETWEEN_QUESTIONS:
            command = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
            answer = subprocess.run(command, capture_output=True, text=True)
            if answer.returncode == 0:
                self._jobs = set(answer.stdout.split())
            self._asked = time.monotonic()
        return self._jobs is None or job in self._jobs


class SlurmWorker:
    """What a job of the array calls; submitted again as it is when Slurm preempts it."""

    def __init__(self, directory: Path, definitions: Sequence[Path], threads: int):
        self.directory = directory.absolute()
        self.definitions = [definition.absolute() for definition in definitions]
        self.threads = threads

    def __call__(self) -> None:
        """Works until every remaining cell is held by another job.

        Raises:
          SystemExit: a stop was requested. Slurm may restart the job, so it has no result.
        """
        from lmjax.ablation import grid, worker

        worker.prepare_process(self.directory, self.threads)
        with worker.StopRequest() as stop:
            worker.work(
                self.directory,
                [grid.read_ablation(definition) for definition in self.definitions],
                stop,
                patient=False,
            )
        if stop.received:
            sys.exit(worker.STOPPED)

    def checkpoint(self) -> Any:
        """The job that continues this one: runs resume from their checkpoints."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
