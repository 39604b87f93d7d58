"""Several processes train one run: the same losses, one writer, and one end for all.

They are processes of this machine, each with a CPU device of its own, connected over loopback.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import POISONED_STEP, STEPS, config, poison, start_run
from run_helpers import finish, result, rows, untimed

from lmjax.train import train

TOLERANCE = 1e-5
"""Relative: what another order of summing in f32 leads to in so many steps, here below 1e-6."""


def losses(workdir: Path) -> list[float]:
    """The training losses of a run, one a step."""
    found = [row for row in rows(workdir) if "loss" in row]
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [float(row["loss"]) for row in found]


def assert_same_losses(workdir: Path, other: Path) -> None:
    """Within f32 rounding; the loss of the poisoned step is NaN in both."""
    assert losses(workdir) == pytest.approx(losses(other), rel=TOLERANCE, nan_ok=True)
    expected = pytest.approx(result(other)["eval_loss"], rel=TOLERANCE)
    assert result(workdir)["eval_loss"] == expected


def train_alone(home: Path, workdir: Path, stop_after: int | None = None) -> Path:
    """The run, or what is left of it, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        train(config(home), workdir, progress=False, stop_after=stop_after)
    return workdir


def complete(processes: list[subprocess.Popen[str]]) -> list[str]:
    """The digest of the parameters that each of them has, once all have ended well."""
    ended = [finish(process) for process in processes]
    assert [code for code, _, _ in ended] == [0] * len(ended), ended
    return [out.splitlines()[-1] for _, out, _ in ended]


def wait_for_checkpoint(workdir: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Returns when the run has its first complete one."""
    deadline = time.monotonic() + 200
    while not (workdir / "checkpoints" / "10").exists():
        assert all(process.poll() is None for process in processes), processes[0].communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def disturb(home: Path, workdir: Path, victim: int, number: int, count: int = 2) -> list[str]:
    """Sends a signal to one process of the run, in its middle.

    Returns:
      What each of the others wrote to stderr. They end within 60 seconds: with exit code 1 if it
      was SIGKILL, 75 if it was SIGTERM.
    """
    processes = start_run(home, workdir, count, seconds=0.2)
    try:
        wait_for_checkpoint(workdir, processes)
        processes[victim].send_signal(number)
        others = [p for rank, p in enumerate(processes) if rank != victim]
        expected = 1 if number == signal.SIGKILL else 75
        assert [p.wait(timeout=60) for p in others] == [expected] * (count - 1)
        assert not (workdir / "result.json").exists()
        return [finish(p)[2] for p in others]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def alone(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in this process."""
    return train_alone(home, tmp_path_factory.mktemp("alone") / "run")


class Restarted:
    """The run in two processes, of which one is killed, and again in two until it is done."""

    def __init__(self, home: Path, workdir: Path):
        self.workdir = workdir
        (self.last_words,) = disturb(home, workdir, 1, signal.SIGKILL)
        self.fewer = shutil.copytree(workdir, workdir.with_name("fewer"))
        self.digests = complete(start_run(home, workdir))


@pytest.fixture(scope="module")
def restarted(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Restarted:
    """Such a run."""
    return Restarted(home, tmp_path_factory.mktemp("restarted") / "run")


def test_two_processes_learn_what_one_does(alone: Path, restarted: Restarted) -> None:
    assert_same_losses(restarted.workdir, alone)


def test_an_infinity_in_the_rows_of_one_process_skips_the_step_in_all(restarted: Restarted) -> None:
    skipped = [row["skipped_steps"] for row in rows(restarted.workdir) if "loss" in row]
    assert skipped == [int(step >= POISONED_STEP) for step in range(1, STEPS + 1)]
    assert restarted.digests == [result(restarted.workdir)["parameters_sha256"]] * 2


def test_one_process_writes(restarted: Restarted) -> None:
    steps_and_evaluation = STEPS + 1
    assert len(rows(restarted.workdir)) == steps_and_evaluation
    # One for the steps of each start, and one for the last evaluation.
    assert len(list((restarted.workdir / "tensorboard").iterdir())) == 3


def test_a_killed_process_ends_the_others_with_a_message(restarted: Restarted) -> None:
    last = restarted.last_words.strip().splitlines()[-1]
    assert re.match(r"error: (process 0 of 2 ends|JAX has ended this process)", last)
    assert "resumes from the newest checkpoint" in last


def test_one_process_resumes_a_run_of_two(home: Path, alone: Path, restarted: Restarted) -> None:
    assert_same_losses(train_alone(home, restarted.fewer), alone)


# --- The same with the undisturbed run beside it, with more processes, and by other ends ---


@pytest.fixture(scope="module", params=[2, 4])
def undisturbed(
    request: pytest.FixtureRequest, home: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """The number of processes, and the directory of the run in as many."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert len(set(complete(start_run(home, workdir, request.param)))) == 1
    return request.param, workdir


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_disturbed_run_becomes_the_undisturbed_one(
    victim: int, number: int, alone: Path, undisturbed: tuple[int, Path], home: Path, tmp_path: Path
) -> None:
    count, reference = undisturbed
    assert_same_losses(reference, alone)
    workdir = tmp_path / "run"
    for words in disturb(home, workdir, victim, number, count):
        assert number != signal.SIGKILL or "error: " in words
    complete(start_run(home, workdir, count))
    assert result(workdir)["parameters_sha256"] == result(reference)["parameters_sha256"]
    assert untimed(workdir) == untimed(reference)


@pytest.mark.long
def test_the_number_of_processes_may_change(alone: Path, home: Path, tmp_path: Path) -> None:
    workdir = train_alone(home, tmp_path / "run", stop_after=8)
    disturb(home, workdir, 1, signal.SIGTERM, 2)
    complete(start_run(home, workdir, 4))
    assert_same_losses(workdir, alone)


@pytest.mark.long
def test_a_process_that_hangs_ends_the_others(home: Path, tmp_path: Path) -> None:
    processes = start_run(home, tmp_path / "run", seconds=0.2)
    try:
        wait_for_checkpoint(tmp_path / "run", processes)
        processes[1].send_signal(signal.SIGSTOP)
        assert processes[0].wait(timeout=60) == 1
        assert "error: JAX has ended this process" in finish(processes[0])[2]
    finally:
        for process in processes:
            process.kill()
