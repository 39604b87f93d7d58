"""Training and ablations under a real Slurm, which the tests start on this machine.

    LMJAX_TEST_SLURM=install python -m pytest -m long tests/test_slurm.py

installs Debian's packages first, as root. Where they are there, neither is needed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import slurm_cluster
from run_helpers import ROOT, finish, home, result, rows, start, tiny_flags, untimed
from slurm_cluster import Slurm

__all__ = ["home"]

pytestmark = pytest.mark.long

STEPS = 600
"""Enough for a signal to come in the middle."""
COMPILER = "--xla_backend_optimization_level=0"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A cluster of this machine, for as long as the tests take."""
    if slurm_cluster.missing():
        if os.environ.get("LMJAX_TEST_SLURM") != "install":
            pytest.skip(
                "nothing is shown about Slurm: it is not installed. On Debian, as root: "
                "LMJAX_TEST_SLURM=install python -m pytest -m long tests/test_slurm.py"
            )
        slurm_cluster.install()
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def own_jobs(slurm: Slurm) -> Iterator[None]:
    """No test sees jobs of another one."""
    yield
    slurm.cancel_all()


def wait_for(happened: Callable[[], bool]) -> None:
    """Returns once something has happened."""
    deadline = time.monotonic() + 240
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- experiments/launch/slurm.sh ---


class Launch(NamedTuple):
    """A checkout with its virtual environment, from which the script is submitted as it is."""

    slurm: Slurm
    checkout: Path
    command: list[str]

    def submit(self) -> str:
        """The number of a new job."""
        return self.slurm.run(
            *("sbatch", "--parsable", "experiments/launch/slurm.sh", *self.command),
            cwd=self.checkout,
            XLA_FLAGS=COMPILER,
        )

    @property
    def run(self) -> Path:
        """Of the training."""
        return self.checkout / "runs" / "tiny"

    def log(self, job: str) -> str:
        """What a job has written."""
        return (self.checkout / f"slurm-{job}.out").read_text()

    def end(self, job: str) -> dict[str, str]:
        """What Slurm says of a job that has ended well."""
        found = self.slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        assert found["JobState"] == "COMPLETED", self.log(job)
        return found

    def start(self) -> str:
        """A new job, once it is training."""
        job = self.submit()
        wait_for(lambda: (self.run / "metrics.jsonl").exists() and len(rows(self.run)) > 1)
        return job


def flags(home: Path, workdir: Path) -> list[str]:
    """Of a small run whose sums do not depend on where its two halves are computed."""
    changes = {
        "mesh.data": 1,
        "mesh.fsdp": 2,
        "deterministic-reductions": 2,
        "evaluation.every": 300,
        "checkpoint.every": 400,
    }
    changed = [part for name, value in changes.items() for part in (f"--{name}", str(value))]
    return tiny_flags(home, workdir, steps=STEPS) + changed


@pytest.fixture
def launch(slurm: Slurm, home: Path, tmp_path: Path) -> Launch:
    """A checkout in which nothing has run."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for name in ("lmjax", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    arguments = flags(home, Path("runs") / "tiny")
    return Launch(slurm, tmp_path, ["python", "-m", "experiments.quickstart", *arguments])


@pytest.fixture(scope="module")
def alone(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process with two devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    devices = f"{COMPILER} --xla_force_host_platform_device_count=2"
    process = start("experiments.quickstart", *flags(home, workdir), cwd=home, XLA_FLAGS=devices)
    code, _, err = finish(process)
    assert code == 0, err
    return workdir


def assert_same_run(workdir: Path, other: Path) -> None:
    """The same losses at the same steps, each once, and the same parameters."""
    assert untimed(workdir) == untimed(other)
    assert result(workdir)["parameters_sha256"] == result(other)["parameters_sha256"]


def test_two_nodes_train_what_one_process_does(launch: Launch, alone: Path) -> None:
    job = launch.submit()
    found = launch.end(job)
    assert (found["NumNodes"], found["ExitCode"]) == ("2", "0:0")
    assert_same_run(launch.run, alone)
    # One for the steps and one for the last evaluation; a second process would have its own.
    assert len(list((launch.run / "tensorboard").iterdir())) == 2
    environment = json.loads((launch.run / "environment.json").read_text())
    assert environment["processes"] == 2
    assert launch.log(job).count("starting runs/tiny") == 1


@pytest.mark.parametrize(
    "command",
    [
        # What Slurm sends before the time is up, by `--signal`.
        ["scancel", "--signal=TERM"],
        # What it does when another job preempts this one.
        ["scontrol", "requeue"],
    ],
)
def test_a_job_that_has_to_stop_is_requeued_and_resumes(
    command: list[str], launch: Launch, alone: Path
) -> None:
    job = launch.start()
    launch.slurm.run(*command, job)
    found = launch.end(job)
    assert found["Restarts"] == "1"
    assert "stopped by SIGTERM at step" in launch.log(job)
    assert "resuming runs/tiny at step" in launch.log(job)
    assert_same_run(launch.run, alone)


def test_a_cancelled_job_saves_a_checkpoint_and_stays_away(launch: Launch, alone: Path) -> None:
    job = launch.start()
    launch.slurm.run("scancel", job)
    launch.slurm.wait(job, "CANCELLED")
    wait_for(lambda: launch.slurm.queue() == [])
    assert "stopped by SIGTERM at step" in launch.log(job)
    assert not (launch.run / "result.json").exists()
    time.sleep(3)
    assert launch.slurm.queue() == []
    launch.end(launch.submit())
    assert_same_run(launch.run, alone)


# --- Ablations, as arrays of jobs ---


def ablation(
    slurm: Slurm, home: Path, workdir: Path, *more: str, jobs: int = 2
) -> subprocess.Popen[str]:
    """Starts or resumes the tiny ablation, with at most so many of its two jobs at a time."""
    search = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "ablation")))
    slurms = ("--slurm", "--slurm-options", "timeout_min=30", f"slurm_array_parallelism={jobs}")
    return start(
        "tiny_ablation",
        *("--workdir", str(workdir), "--processes", "2", "--steps", "200"),
        *(slurms if jobs else ()),
        *more,
        cwd=home,
        PYTHONPATH=search,
        **slurm.environment,
    )


class Table(NamedTuple):
    """What an ablation comes to: what it prints of its cells and differences, and the digests."""

    lines: list[str]
    digests: dict[str, str]


def table(process: subprocess.Popen[str], workdir: Path) -> Table:
    """That of a command, once it has ended well."""
    code, out, err = finish(process)
    assert code == 0, err
    lines = out[out.index("\neval_loss") :].splitlines()[:-1]
    runs = sorted((workdir / "cells").iterdir())
    return Table(lines, {run.name: result(run)["parameters_sha256"] for run in runs})


@pytest.fixture(scope="module")
def local(slurm: Slurm, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Table:
    """What processes of this machine come to."""
    workdir = tmp_path_factory.mktemp("local") / "ablation"
    return table(ablation(slurm, home, workdir, jobs=0), workdir)


def training_job(slurm: Slurm, workdir: Path) -> str:
    """The first job of the array, once one of its cells has logged a few steps."""
    begun = (workdir / "cells").glob
    wait_for(lambda: any(len(rows(path.parent)) > 5 for path in begun("*/metrics.jsonl")))
    return min(slurm.queue())


def test_an_array_of_jobs_comes_to_the_same_table(
    slurm: Slurm, home: Path, local: Table, tmp_path: Path
) -> None:
    process = ablation(slurm, home, tmp_path / "ablation")
    wait_for(lambda: len(slurm.queue()) == 2)
    first, second = sorted(slurm.queue())
    assert (first.rpartition("_")[0], first[-2:]) == (second.rpartition("_")[0], "_0")
    assert table(process, tmp_path / "ablation") == local


@pytest.mark.parametrize(
    "command",
    [
        # What Slurm sends before the time is up; submitit puts the job back then.
        ["scancel", "--signal=USR2"],
        ["scontrol", "requeue"],
    ],
)
def test_a_job_of_the_array_that_has_to_stop_resumes(
    command: list[str], slurm: Slurm, home: Path, local: Table, tmp_path: Path
) -> None:
    """The other job waits until this one is done, so it alone does its work."""
    workdir = tmp_path / "ablation"
    process = ablation(slurm, home, workdir, jobs=1)
    job = training_job(slurm, workdir)
    slurm.run(*command, job)
    assert table(process, workdir) == local
    assert slurm.job(job)["Restarts"] == "1"


def test_a_stopped_command_takes_its_jobs_with_it(
    slurm: Slurm, home: Path, local: Table, tmp_path: Path
) -> None:
    """Also the one that has not begun yet."""
    workdir = tmp_path / "ablation"
    process = ablation(slurm, home, workdir, jobs=1)
    training_job(slurm, workdir)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 75, err
    assert slurm.queue() == []
    # Processes resume what jobs began.
    assert table(ablation(slurm, home, workdir, jobs=0), workdir) == local


def test_a_lost_job_stops_the_command(
    slurm: Slurm, home: Path, local: Table, tmp_path: Path
) -> None:
    workdir = tmp_path / "ablation"
    process = ablation(slurm, home, workdir)
    job = training_job(slurm, workdir)
    slurm.run("scancel", "--signal=KILL", job)
    code, _, err = finish(process)
    assert code == 1
    assert f"error: job {job} was ended before its work was" in err
    wait_for(lambda: slurm.queue() == [])
    shutil.rmtree(workdir / "logs")
    assert table(ablation(slurm, home, workdir), workdir) == local
