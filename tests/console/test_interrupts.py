"""Signals that reach a command while it imports, compiles or waits: one line, and the exit code.

Signals during training: `train/test_kill.py`.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_helpers import ROOT

BLOCKED = """
import ctypes, os, sys
from lmjax.console import interrupts
from lmjax.console import stages
from lmjax.console.signals import StopRequest
interrupts.PATIENCE_SECONDS = 0.5
interrupts.watch()
mutex = ctypes.create_string_buffer(64)
def block():  # in C, as XLA's compiler does: no signal handler of Python's runs
    print("ready", flush=True)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
if sys.argv[1] == "listening":
    with stages.stage("compiling"), StopRequest():
        block()
else:
    with interrupts.catching():
        block()
"""


def blocked(how: str) -> subprocess.Popen[str]:
    """A command whose main thread is in C and stays there."""
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED, how],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)  # from this line to the lock it is still in Python
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_acknowledges_while_it_compiles_and_obeys_the_second(number: signal.Signals) -> None:
    process = blocked("listening")
    assert process.stderr is not None
    process.send_signal(number)
    line = process.stderr.readline()
    assert line.startswith(f"{number.name} while compiling: stopping after the next step")
    assert line.endswith("again to stop at once\n" if number == 2 else "it again to stop at once\n")
    assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (
        128 + number,
        f"stopped by {number.name} while compiling\n",
    )


def test_a_command_that_cannot_end_by_itself_is_ended() -> None:
    process = blocked("catching")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "stopped by SIGINT\n")


def in_terminal(command: str, awaited: str, number: signal.Signals, cwd: Path) -> tuple[int, str]:
    """Exit code and output of a command in a terminal that gets a signal when it says something."""
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", *command.split()],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        cwd=cwd,
        stdin=its,
        stdout=its,
        stderr=its,
    )
    os.close(its)
    text, deadline = "", time.monotonic() + 120
    try:
        while awaited not in text and time.monotonic() < deadline:
            text += os.read(ours, 1000).decode()
        process.send_signal(number)
        while True:
            text += os.read(ours, 1000).decode()
    except OSError:  # Linux's end of a terminal
        return process.wait(timeout=60), text
    finally:
        process.kill()
        os.close(ours)


@pytest.mark.parametrize(
    ("command", "awaited", "number"),
    [
        ("experiments.quickstart --workdir run", "importing ... 0 s", signal.SIGINT),
        ("experiments.ablations.bf16_mixed --workdir run", "importing ... 0 s", signal.SIGTERM),
        ("lmjax plan experiments.quickstart", "importing ... 0 s", signal.SIGINT),
        ("lmjax plan experiments.quickstart", "compiling the train step for 8", signal.SIGINT),
    ],
)
def test_a_command_in_a_terminal_says_what_it_does_and_stops(
    command: str, awaited: str, number: signal.Signals, tmp_path: Path
) -> None:
    code, text = in_terminal(command, awaited, number, tmp_path)
    assert awaited in text
    assert code == 128 + number
    assert "Traceback" not in text
    (last,) = (line for line in text.splitlines() if f"stopped by {number.name}" in line)
    assert ("nothing was written" in last) == ("importing" in awaited)
    assert list(tmp_path.iterdir()) == []


def test_only_the_standard_library_is_imported_before_a_command_speaks() -> None:
    program = (
        "import sys; before = set(sys.modules); from lmjax.console import opening; opening.begin();"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert set(out.split()) - set(sys.stdlib_module_names) == {"lmjax"}
