"""Faults: after a restart the final parameters are those of the undisturbed run, every time.

    python -m pytest -m long tests/train/test_faults.py

does everything that is promised, in half an hour on two cores, and prints a table of it; the
default suite has a representative of each kind. `SIGKILLS` and `SIGTERMS` in the environment change
how many signals are sent.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_helpers import finish, result, start, tiny, tiny_flags, untimed
from test_checkpoint import KINDS, damage

from lmjax.errors import CheckpointError, StorageFailed
from lmjax.runs.checkpoint import Checkpoints
from lmjax.train import InputError, train

SIGKILLS = int(os.environ.get("SIGKILLS", "50"))
SIGTERMS = int(os.environ.get("SIGTERMS", "20"))
WAYS = ("truncated", "flipped", "deleted")

Row = Callable[[str, list[bool]], None]


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmjax.train.records.draw_curves", lambda *_: None)


@pytest.fixture
def row(record_property: Callable[[str, object], None]) -> Row:
    """`row(fault, equal)`: a row of the table at the end; `equal` says of each time how it went."""

    def record(fault: str, equal: list[bool]) -> None:
        record_property("fault", (fault, len(equal), sum(equal)))
        assert equal
        assert all(equal)

    return record


# --- In this process ---


@pytest.fixture(scope="module")
def config(home: Path) -> Any:
    """Everything that a state can hold: delayed scaling, dropout, a loss scale, two phases."""
    return tiny(
        home,
        "0: mixed_f16,w=e4m3@tensor.delayed4 | 27: mixed_bf16",
        model={"dropout": 0.1},
        loss_scale={"initial": 2.0**24, "growth_interval": 7, "kind": "dynamic"},
    )


@pytest.fixture(scope="module")
def undisturbed(config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the run that nothing happens to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmjax.train.records.draw_curves", lambda *_: None)
        workdir = tmp_path_factory.mktemp("undisturbed") / "run"
        train(config, workdir, progress=False)
    return workdir


@pytest.fixture(scope="module")
def stopped(config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with checkpoints of steps 20 and 23."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    train(config, workdir, stop_after=23, progress=False)
    return workdir


def is_same_run(workdir: Path, reference: Path) -> bool:
    """Same parameters, same losses, each step once."""
    return untimed(workdir) == untimed(reference) and all(
        result(workdir)[name] == result(reference)[name]
        for name in ("parameters_sha256", "eval_loss", "steps", "tokens")
    )


def survives_damage(
    kind: str, how: str, config: Any, stopped: Path, undisturbed: Path, workdir: Path
) -> bool:
    """Whether a run whose newest checkpoint is damaged becomes the undisturbed one."""
    shutil.copytree(stopped, workdir)
    damage(workdir / "checkpoints" / "23", kind, how)
    train(config, workdir, progress=False)
    aside = [path.name for path in (workdir / "checkpoints" / "damaged").iterdir()]
    return aside == ["23"] and is_same_run(workdir, undisturbed)


def test_a_flipped_bit(
    config: Any, stopped: Path, undisturbed: Path, tmp_path: Path, row: Row
) -> None:
    run = tmp_path / "run"
    row(
        "one flipped bit",
        [survives_damage("state/d/", "flipped", config, stopped, undisturbed, run)],
    )


@pytest.mark.long
@pytest.mark.parametrize("how", WAYS)
def test_every_kind_of_file_damaged(
    how: str, config: Any, stopped: Path, undisturbed: Path, tmp_path: Path, row: Row
) -> None:
    equal = [
        survives_damage(kind, how, config, stopped, undisturbed, tmp_path / str(number))
        for number, kind in enumerate(KINDS)
    ]
    row(f"newest checkpoint: each kind of file {how}", equal)


def test_all_checkpoints_damaged_is_an_error_and_no_start_from_scratch(
    config: Any, stopped: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    for step in ("20", "23"):
        damage(run / "checkpoints" / step, "data.json", "deleted")
    before = (run / "metrics.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="start again from step 0"):
            train(config, run, progress=False)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_the_clock_jumps(
    config: Any, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Row
) -> None:
    """A year forth and two years back, at every reading."""
    now, year = time.time(), 365 * 86400.0
    jumps = itertools.cycle((now, now + year, now - year))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    train(config, tmp_path / "run", progress=False)
    monkeypatch.undo()
    assert 0 < result(tmp_path / "run")["train_seconds"] < 1000
    row("clock jumps by years", [is_same_run(tmp_path / "run", undisturbed)])


def test_a_metrics_file_that_blocks(
    config: Any, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Row
) -> None:
    """Training and its checkpoints continue; the rows are written by the run that comes after."""
    from lmjax.runs.metrics import MetricsWriter

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("lmjax.runs.metrics.PATIENCE_SECONDS", 0.1)
        patch.setattr(MetricsWriter, "_append", lambda *_: time.sleep(3600))
        train(config, run, stop_after=33, progress=False)
    train(config, run, progress=False)
    same = result(run)["parameters_sha256"] == result(undisturbed)["parameters_sha256"]
    row("metrics writer blocks", [same])


@contextlib.contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own that can be filled; only root can make one."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(command).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Takes all that is free; returns the file that holds it."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


@pytest.mark.parametrize("moment", ["checkpoint", "metrics"])
def test_the_disk_is_full(
    moment: str,
    config: Any,
    stopped: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    row: Row,
) -> None:
    """From step 30 on, where a checkpoint is due, or from a row before that."""
    from lmjax.runs.metrics import MetricsWriter

    with small_disk(tmp_path / "disk", 8) as disk:
        run = disk / "run"
        shutil.copytree(stopped, run)
        owner, name = (Checkpoints, "save") if moment == "checkpoint" else (MetricsWriter, "write")
        whole = getattr(owner, name)
        fillings: list[Path] = []

        def fill_first(*arguments: Any, **options: Any) -> None:
            fillings.append(fill(disk))
            whole(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fill_first)
            with pytest.raises(StorageFailed, match="No space left on device"):
                train(config, run, progress=False)
        checkpoints = Checkpoints(run / "checkpoints")
        assert checkpoints.newest_intact() == 23
        checkpoints.close()
        fillings[0].unlink()
        train(config, run, progress=False)
        row(f"disk is full ({moment})", [is_same_run(run, undisturbed)])


def test_the_directory_is_read_only(
    config: Any, stopped: Path, undisturbed: Path, tmp_path: Path, row: Row
) -> None:
    with small_disk(tmp_path / "disk", 8) as disk:
        shutil.copytree(stopped, disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(InputError, match="Read-only file system"):
            train(config, disk / "run", progress=False)
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        train(config, disk / "run", progress=False)
        row("read-only directory", [is_same_run(disk / "run", undisturbed)])


# --- In processes of their own ---

STEPS = 400
MODULE = "experiments.quickstart"


def launch(home: Path, workdir: Path) -> subprocess.Popen[str]:
    """Starts or resumes the run."""
    return start(MODULE, *tiny_flags(home, workdir, steps=STEPS), cwd=home)


def complete(home: Path, workdir: Path) -> float:
    """Runs to the end; returns the seconds that it took."""
    before = time.monotonic()
    code, _, err = finish(launch(home, workdir))
    assert code == 0, err
    return time.monotonic() - before


def wait_for_a_row(process: subprocess.Popen[str], workdir: Path) -> None:
    """Returns when the process has written something, or ended."""
    path = workdir / "metrics.jsonl"
    before = path.stat().st_mtime_ns if path.exists() else 0
    while process.poll() is None and not (path.exists() and path.stat().st_mtime_ns > before):
        time.sleep(0.002)


@pytest.mark.long
@pytest.mark.parametrize(("number", "times"), [("SIGKILL", SIGKILLS), ("SIGTERM", SIGTERMS)])
def test_signals_at_random_moments(
    number: str, times: int, home: Path, tmp_path: Path, row: Row
) -> None:
    """Half of them anywhere from the first import to the last file, half while steps are done.

    A run that reaches its end is compared and started over, as is the one after the last signal.
    """
    reference = tmp_path / "reference"
    complete(home, reference)
    duration = complete(home, tmp_path / "timed")
    draw, sent, equal = random.Random(number), 0, []
    workdir = tmp_path / "run"
    while sent < times:
        process = launch(home, workdir)
        if sent % 2:
            wait_for_a_row(process, workdir)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, duration / 3 if sent % 2 else duration))
        process.send_signal(signal.Signals[number])
        code, _, err = finish(process)
        # Before its handler is there a SIGTERM ends a process as it ends any other.
        assert code in (0, 75, -signal.Signals[number]), err
        sent += code != 0
        if (workdir / "result.json").exists():
            complete(home, workdir)
            equal.append(is_same_run(workdir, reference))
            shutil.rmtree(workdir)
    complete(home, workdir)
    equal.append(is_same_run(workdir, reference))
    row(f"{number} at {times} random moments, {len(equal)} runs", equal)


@pytest.mark.long
def test_meshes_of_one_eight_four_and_one_device(home: Path, tmp_path: Path, row: Row) -> None:
    """Losses agree within f32 rounding, which sums over devices in another order."""
    lossless = ["--precision", "f32", "--batch-size", "8", "--log-every", "1"]

    def run(workdir: Path, devices: int, *flags: str) -> int:
        host = f"--xla_force_host_platform_device_count={devices}"
        process = start(
            MODULE,
            *tiny_flags(home, workdir),
            *lossless,
            *flags,
            cwd=home,
            XLA_FLAGS=f"--xla_backend_optimization_level=0 {host}",
        )
        code, _, err = finish(process)
        assert code in (0, 75), err
        return code

    moved, still = tmp_path / "moved", tmp_path / "still"
    assert run(still, 1) == 0
    assert run(moved, 1, "--stop-after", "10") == 75
    assert run(moved, 8, "--stop-after", "10") == 75
    assert run(moved, 4, "--stop-after", "10", "--mesh.fsdp", "2", "--mesh.tensor", "2") == 75
    assert run(moved, 1) == 0
    rows = [
        (ours["step"], ours["loss"], theirs["loss"])
        for ours, theirs in zip(untimed(moved), untimed(still), strict=True)
        if "loss" in ours
    ]
    assert len(rows) == 40
    row(
        "meshes 1, 8, 2x2, 1: losses of 40 steps within 1e-5",
        [abs(ours - theirs) < 1e-5 * theirs for _, ours, theirs in rows],
    )
