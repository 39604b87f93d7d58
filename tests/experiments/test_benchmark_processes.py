"""A contestant that dies is named, with how it died, and the others' results are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest

from experiments.benchmarks import contestants, throughput
from experiments.benchmarks.contestants import SHAPES, Contestant, contestant
from experiments.benchmarks.processes import GIB, Died, Worker, can_cap_memory

ANSWER = 'print(\'{"seconds": 0.5, "loss": 4.0}\', flush=True)'
FINE = f"import sys\nfor line in sys.stdin: {ANSWER}"
DOOMED = f"import os, sys\nfor i, line in enumerate(sys.stdin):\n if i < 2: {ANSWER}\n else: %s"
"""Answers twice, and no more."""
KILLED = DOOMED % "os.kill(os.getpid(), 9)"
GREEDY = DOOMED % "bytearray(2**31)"


@pytest.fixture
def worker() -> Callable[..., Worker]:
    """`worker(script, **options)`: a process that runs a script, ended after the test."""
    started = []

    def start(script: str, **options: object) -> Worker:
        started.append(Worker("it", [sys.executable, "-c", script], **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL, as the kernel does when memory"),
        ("import os; os.abort()", "it: killed by SIGABRT"),
        ("raise MemoryError('no room')", r"it: exit code 1 \(MemoryError: no room\)"),
        ("raise SystemExit(3)", "it: exit code 3"),
        ("print('{\"half', end='')", "it: exit code 0"),
    ],
)
def test_how_a_process_ended_is_said(script: str, message: str, worker):
    with pytest.raises(Died, match=message):
        worker(script).ask("")


def test_what_it_had_is_said(worker):
    killed = worker(KILLED)
    killed.ask("")
    killed.ask("")
    with pytest.raises(Died, match=r"it had 0\.0 GiB when it answered last"):
        killed.ask("")


def test_memory_of_a_device_is_what_a_process_says(worker):
    own = worker(FINE.replace('"loss"', '"peak_bytes": 12345, "loss"'))
    own.ask("")
    assert own.peak_bytes == 12345


@pytest.mark.skipif(not can_cap_memory(), reason="memory cannot be capped here")
def test_memory_is_capped(worker):
    greedy = worker(GREEDY, max_bytes=GIB // 4)
    greedy.ask("")
    greedy.ask("")
    with pytest.raises(Died, match=r"\(MemoryError\); it may allocate 0\.2 GiB"):
        greedy.ask("")


def test_a_program_that_does_not_exist():
    with pytest.raises(Died, match=r"it: .*no such program"):
        Worker("it", ["/no such program"])


def test_a_contestant_without_memory_is_not_started(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contestants, "free_bytes", lambda device: GIB // 2)
    started, missing = throughput.start(SHAPES["tiny"], ["f32"], ["jnp", "torch"], "python")
    assert not started
    assert len(missing) == 6
    assert missing[1] == ("left out: jnp f32: it needs about 0.5 GiB, and 0.5 GiB are free", True)


def test_the_largest_shape_needs_gigabytes():
    assert 2 * GIB < contestants.estimated_bytes(SHAPES["M"]) < 8 * GIB


def test_the_others_finish(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def start(name: str, script: str) -> Contestant:
        return contestant(name, "float32", [sys.executable, "-c", script])

    fakes = {"lmjax f32": FINE, "jnp f32": KILLED, "torch f32": FINE}
    monkeypatch.setattr(
        throughput, "start", lambda *_: ([start(*fake) for fake in fakes.items()], [])
    )
    monkeypatch.setattr(throughput, "product_rates", lambda *_, rows: {"float32": lambda: 1e9})
    assert throughput.main(["--shape", "tiny", "--rounds", "3", "--json"]) == 1
    printed = capsys.readouterr()
    assert "died: jnp f32: killed by SIGKILL" in printed.err
    result = json.loads(printed.out)
    assert set(result["contestants"]) == {"lmjax f32", "torch f32"}
    assert set(result["ratios"]) == {"lmjax f32 / torch f32"}
    assert result["tokens_per_second"]["torch f32"] == [32 * 2 / 0.5] * 3
    assert result["contestants"]["torch f32"]["peak_bytes"] > 2**20
    assert "jnp f32" not in throughput.table(result)


@pytest.mark.parametrize("flags", ["--max-memory 0", "--max-memory nan", "--max-memory inf"])
def test_a_cap_must_be_a_size(flags: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        throughput.main(["--shape", "tiny", *flags.split()])
    assert end.value.code == 2
    assert "max-memory" in capsys.readouterr().err
