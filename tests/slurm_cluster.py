"""Slurm on this machine, as tests start it: two nodes with a loopback address each as their name.

Daemons run as this user with all their files in one folder; a Slurm that the machine may belong to
is left alone. The programs are those of Debian's packages `slurmctld slurmd slurm-client munge`.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("127.0.0.1", "127.0.0.2")
"""What the first node is called is what processes connect to, so it must be an address here."""

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1
GresTypes=gpu
NodeName={nodes[0]} NodeAddr={nodes[0]} NodeHostname={host} Port={ports[1]} CPUs=4 Gres=gpu:8
NodeName={nodes[1]} NodeAddr={nodes[1]} NodeHostname={host} Port={ports[2]} CPUs=4 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
"""Credentials expire early because a job that is put back waits for that. GPUs are empty files."""


class Slurm:
    """The commands of a running cluster.

    Attributes:
      environment: variables by which commands find it, on top of those of this process.
    """

    def __init__(self, folder: Path):
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """What a command prints.

        Raises:
          CalledProcessError: it failed.
        """
        variables = {**os.environ, **self.environment, **environment}
        answer = subprocess.run(
            command, cwd=cwd, env=variables, check=True, stdout=subprocess.PIPE, text=True
        )
        return answer.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol` says of a job, by name."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str, seconds: float = 240) -> dict[str, str]:
        """Returns what `scontrol` says of a job once that is in one of some states.

        Raises:
          TimeoutError: it does not get there.
        """
        deadline = time.monotonic() + seconds
        while (found := self.job(job))["JobState"] not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {found['JobState']}, not {' or '.join(states)}")
            time.sleep(0.5)
        return found

    def queue(self) -> list[str]:
        """The numbers of all jobs that wait or run, those of an array one by one."""
        return self.run("squeue", "--array", "--noheader", "--format=%i").split()

    def cancel_all(self) -> None:
        """Returns when no job is left.

        Raises:
          TimeoutError: some do not end.
        """
        deadline = time.monotonic() + 180
        while jobs := self.queue():
            if time.monotonic() > deadline:
                raise TimeoutError(f"jobs {jobs} do not end")
            # Again and again: a job that is just being started does not hear it.
            self.run("scancel", "--me")
            time.sleep(2)


@contextmanager
def running(folder: Path) -> Iterator[Slurm]:
    """Starts a cluster, and ends its jobs and daemons.

    Raises:
      RuntimeError: its nodes do not come up.
      TimeoutError: its jobs do not end.
    """
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)
    for name in ("state", "gpu", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    for number in range(8):
        (folder / "gpu" / str(number)).touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu/[0-7]\n")
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            folder=folder,
            host=socket.gethostname().partition(".")[0],
            user=getpass.getuser(),
            nodes=NODES,
            ports=_free_ports(3),
        )
    )
    daemons: list[subprocess.Popen[bytes]] = []
    slurm = Slurm(folder)
    try:
        for name, command in _daemons(folder).items():
            with (folder / f"{name}.log").open("wb") as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        _wait_until_idle(slurm, folder)
        yield slurm
        slurm.cancel_all()
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def _daemons(folder: Path) -> dict[str, list[str]]:
    """Their commands by what they and their logs are called, in the order of starting."""
    # munged would refuse a folder that others may not read; and only this process uses this one.
    munged = [_found("munged"), "--foreground", "--force", f"--key-file={folder}/munge.key"]
    files = {"socket": "socket", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
    configuration = ["-D", "-f", f"{folder}/slurm.conf"]
    return {
        "munged": munged + [f"--{flag}={folder}/munge.{end}" for flag, end in files.items()],
        "slurmctld": [_found("slurmctld"), *configuration],
        **{f"slurmd-{node}": [_found("slurmd"), *configuration, "-N", node] for node in NODES},
    }


def _wait_until_idle(slurm: Slurm, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.5)
        try:
            states = slurm.run("sinfo", "--noheader", "--Node", "--format=%T").split()
        except subprocess.CalledProcessError:
            continue
        if states == ["idle"] * len(NODES):
            return
    logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
    raise RuntimeError(f"the nodes of Slurm do not come up:\n{logs}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def missing() -> list[str]:
    """The programs that are not installed."""
    return [name for name in PROGRAMS if not _found(name)]


def _found(program: str) -> str:
    """Where a program is, if anywhere: that of a daemon is on the path of root alone."""
    search = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    return shutil.which(program, path=search) or ""


def install() -> None:
    """Installs what is missing from Debian's packages, as root.

    Raises:
      CalledProcessError: apt-get cannot.
    """
    options = ("--yes", "--no-install-recommends")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update"], check=True, env=quiet)
    subprocess.run(["apt-get", "install", *options, *PACKAGES], check=True, env=quiet)
