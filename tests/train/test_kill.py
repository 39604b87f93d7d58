"""Processes that are asked to stop, and processes that are killed without being asked.

More of them, at random moments: `test_faults.py`.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from run_helpers import finish, result, rows, start, tiny_flags, untimed

STEPS = 400
MODULE = "experiments.quickstart"


def launch(home: Path, workdir: Path) -> subprocess.Popen[str]:
    """Starts or resumes the run."""
    return start(MODULE, *tiny_flags(home, workdir, steps=STEPS), cwd=home)


def complete(home: Path, workdir: Path) -> None:
    """Runs to the end."""
    code, _, err = finish(launch(home, workdir))
    assert code == 0, err


def wait_for_step(process: subprocess.Popen[str], workdir: Path, step: int) -> None:
    """Returns when the run has logged a step."""
    path = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (path.exists() and f'{{"step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_same_run(workdir: Path, reference: Path) -> None:
    """Same parameters, same losses, each step once."""
    assert result(workdir)["parameters_sha256"] == result(reference)["parameters_sha256"]
    assert result(workdir)["eval_loss"] == result(reference)["eval_loss"]
    assert untimed(workdir) == untimed(reference)


@pytest.fixture(scope="module")
def undisturbed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the uninterrupted run."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    complete(home, workdir)
    return workdir


def test_sigint_and_sigterm_save_and_exit_75(home: Path, undisturbed: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    for number, logged in ((signal.SIGINT, 5), (signal.SIGTERM, 155)):
        process = launch(home, workdir)
        wait_for_step(process, workdir, logged)
        process.send_signal(number)
        code, _, err = finish(process)
        assert code == 75, err
        assert not (workdir / "result.json").exists()
        name = signal.Signals(number).name
        assert f"{name}: stopping after the next step, with a checkpoint" in err
        assert "to stop at once" in err

        saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
        assert f"stopped by {name} at step {saved};" in err
        assert logged <= saved < STEPS
        assert saved - 5 < max(row["step"] for row in rows(workdir)) <= saved
    complete(home, workdir)
    assert_same_run(workdir, undisturbed)


@pytest.mark.long
def test_killed_twice(home: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Soon after a checkpoint, which may still be being written, and anywhere."""
    workdir = tmp_path / "run"
    draw = random.Random(0)
    for logged in (105, draw.randrange(155, STEPS - 50, 5)):
        process = launch(home, workdir)
        wait_for_step(process, workdir, logged)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
    complete(home, workdir)
    assert_same_run(workdir, undisturbed)


def test_a_second_signal_is_obeyed_at_once() -> None:
    from lmjax.console.signals import StopRequest

    # What a process started in the background of a script inherits is to ignore it.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.received == "SIGINT"
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_the_handlers_are_given_back() -> None:
    from lmjax.console.signals import StopRequest

    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in StopRequest.SIGNALS] != before
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before
