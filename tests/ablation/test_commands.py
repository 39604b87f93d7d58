"""Ablations as commands: any number of processes, interrupted anywhere, one table."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny_ablation
from run_helpers import ROOT, finish, home, result, start, strict_loads

from lmjax.ablation import compare_cells, grid, runner
from lmjax.ablation.words import significant
from lmjax.cli import ablation as ablation_cli
from lmjax.cli import common as cli
from lmjax.cli import verbs

__all__ = ["home"]

MODULE = "tiny_ablation"
SEARCH = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "ablation")))


def launch(home: Path, workdir: Path, *flags: str) -> subprocess.Popen[str]:
    """Starts or resumes the command, in its own process group."""
    return start(MODULE, "--workdir", str(workdir), *flags, cwd=home, group=True, PYTHONPATH=SEARCH)


def table(out: str) -> list[list[str]]:
    """The words of the table of the cells."""
    lines = out.splitlines()
    first = max(i for i, line in enumerate(lines) if line.startswith("eval_loss"))
    return [line.split() for line in lines[first:][:3]]


def digests(workdir: Path) -> dict[str, str]:
    """The digest of the parameters of every cell."""
    runs = grid.cells_directory(workdir).iterdir()
    return {run.name: result(run)["parameters_sha256"] for run in sorted(runs)}


def complete(home: Path, workdir: Path, *flags: str) -> list[list[str]]:
    """The table of the command once it is done."""
    code, out, err = finish(launch(home, workdir, *flags))
    assert code == 0, err
    return table(out)


def wait_for_step(process: subprocess.Popen[str], workdir: Path, step: int) -> None:
    """Returns when some cell that has not ended has logged a step."""
    deadline = time.monotonic() + 120
    while True:
        runs = list(grid.cells_directory(workdir).glob("*-seed?"))
        states = [grid.read_state(run, "eval_loss") for run in runs]
        if any(state.status == "missing" and state.step >= step for state in states):
            return
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of an uninterrupted ablation, run by two processes, and its output.

    The programs come out of its own compilation cache, which other tests use as well.
    """
    workdir = tmp_path_factory.mktemp("undisturbed") / "ablation"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_COMPILATION_CACHE_DIR")
        code, out, err = finish(launch(home, workdir, "--processes", "2"))
    assert code == 0, err
    return workdir, out


@pytest.fixture
def compiled(undisturbed: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find their programs compiled."""
    (cache,) = (undisturbed[0] / "compiled").iterdir()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))


@pytest.mark.long
def test_the_command_prints_what_the_runs_say_and_writes_the_report(
    undisturbed: tuple[Path, str],
) -> None:
    workdir, out = undisturbed
    cells = grid.read_cells(tiny_ablation.ablation(), workdir)
    values = [significant(result(cell.directory)["eval_loss"]) for cell in cells]
    assert table(out) == [
        ["eval_loss", "seed", "0", "seed", "1"],
        ["f32", *values[:2]],
        ["bf16", *values[2:]],
    ]
    assert len(set(values)) == 4
    verdict = compare_cells(tiny_ablation.ablation(), cells)["bf16"].verdict.text
    assert verdict in out
    assert verdict in (workdir / "report.md").read_text("utf-8")
    assert out.splitlines()[-1] == f"the report is {workdir / 'report.html'}"


@pytest.mark.long
def test_arms_that_compile_alike_compile_once(undisturbed: tuple[Path, str]) -> None:
    """One program of a kind for both seeds; parameters are f32 in both arms."""
    names = [path.name for path in (undisturbed[0] / "compiled").glob("*/jit_*-cache")]
    assert len([name for name in names if name.startswith("jit_step-")]) == 2
    assert len([name for name in names if name.startswith("jit_eval_step-")]) == 2
    assert len([name for name in names if name.startswith("jit_init-")]) == 1
    # What a worker has nothing to say about leaves no log.
    assert not list((undisturbed[0] / "logs").iterdir())


@pytest.mark.long
@pytest.mark.usefixtures("compiled")
def test_killed_and_gone_on_with_by_two_commands_at_once(
    home: Path, undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    """SIGKILL at a random step; of the two that resume, one is asked to stop. The same bits."""
    process = launch(home, tmp_path)
    wait_for_step(process, tmp_path, random.Random(0).choice((5, 10, 15, 20)))
    os.killpg(process.pid, signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    assert "missing" in {cell.status for cell in cells(tmp_path)}

    first, second = (launch(home, tmp_path) for _ in range(2))
    wait_for_step(first, tmp_path, 25)
    first.send_signal(signal.SIGTERM)
    code, out, err = finish(first)
    assert code == 75, err
    assert "stopped by SIGTERM; run the same command again to resume" in err
    assert "missing" in str(table(out))

    code, out, err = finish(second)
    assert code == 0, err
    assert table(out) == table(undisturbed[1])
    assert digests(tmp_path) == digests(undisturbed[0])
    report = (undisturbed[0] / "report.md").read_bytes()
    assert (tmp_path / "report.md").read_bytes() == report


@pytest.mark.long
@pytest.mark.usefixtures("compiled")
def test_a_killed_worker_stops_the_command(
    home: Path, undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    process = launch(home, tmp_path, "--processes", "2")
    wait_for_step(process, tmp_path, 5)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 1
    assert "error: a worker was ended by SIGKILL; run the same command again to resume" in err
    assert complete(home, tmp_path, "--processes", "2") == table(undisturbed[1])
    assert digests(tmp_path) == digests(undisturbed[0])


def cells(workdir: Path) -> list[grid.Cell]:
    """The cells of the tiny ablation."""
    return grid.read_cells(tiny_ablation.ablation(), workdir)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = [map(int, line.split()) for line in listed.stdout.splitlines()]
    return [child for child, parent in pairs if parent == pid]


@pytest.mark.long
@pytest.mark.usefixtures("compiled")
def test_killed_at_ten_random_moments(
    home: Path, undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    """Anywhere from the first import to the last file; the whole group, or the command alone."""
    draw = random.Random(0)
    before = time.monotonic()
    complete(home, tmp_path / "timed", "--processes", "2")
    duration = time.monotonic() - before
    killed, workdir = 0, tmp_path / "0"
    while killed < 10:
        process = launch(home, workdir, "--processes", "2")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, duration))
        # Without the group the workers are orphans, which notice and stop.
        with contextlib.suppress(ProcessLookupError):
            kill = os.kill if killed % 3 == 2 else os.killpg
            kill(process.pid, signal.SIGKILL)
        killed += finish(process)[0] == -signal.SIGKILL
        if workdir.exists() and all(cell.status == "finished" for cell in cells(workdir)):
            assert digests(workdir) == digests(undisturbed[0])
            workdir = tmp_path / str(killed)
    assert complete(home, workdir, "--processes", "2") == table(undisturbed[1])
    assert digests(workdir) == digests(undisturbed[0])


@pytest.mark.long
@pytest.mark.usefixtures("compiled")
def test_slurm_through_submitit(home: Path, undisturbed: tuple[Path, str], tmp_path: Path) -> None:
    """The job runs on this machine; submitit's Slurm executor differs in how it starts it.

    One cell is left to run.
    """
    pytest.importorskip("submitit")
    workdir = tmp_path / "ablation"
    shutil.copytree(undisturbed[0], workdir)
    shutil.rmtree(cells(workdir)[-1].directory)
    flags = ("--slurm", "--slurm-options", "cluster=local", "timeout_min=10")
    assert complete(home, workdir, *flags) == table(undisturbed[1])
    assert digests(workdir) == digests(undisturbed[0])


@pytest.mark.long
def test_the_report_is_rebuilt_from_the_files(
    undisturbed: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "moved"
    for name in ("ablation.json", "cells"):
        copy = shutil.copytree if name == "cells" else shutil.copy
        workdir.mkdir(exist_ok=True)
        copy(undisturbed[0] / name, workdir / name)
    assert lmjax("report", str(workdir)) == cli.DONE
    out = capsys.readouterr().out
    assert table(out) == table(undisturbed[1])
    assert out.splitlines()[-4:-1] == undisturbed[1].splitlines()[-4:-1]
    for name in ("report.md", "report.html"):
        assert (workdir / name).read_bytes() == (undisturbed[0] / name).read_bytes()

    assert lmjax("report", str(workdir), "--json") == cli.DONE
    found = strict_loads(capsys.readouterr().out)
    expected = compare_cells(tiny_ablation.ablation(), cells(workdir))["bf16"]
    assert found["comparisons"]["bf16"]["text"] == expected.verdict.text
    assert found["comparisons"]["bf16"]["differences"] == {
        str(seed): value for seed, value in expected.differences.items()
    }

    shutil.rmtree(cells(workdir)[-1].directory)
    assert lmjax("report", str(workdir)) == cli.DONE
    assert table(capsys.readouterr().out)[2][2] == "missing"

    assert lmjax("report", str(tmp_path)) == cli.BAD_INPUT
    assert "of neither an ablation nor a run" in capsys.readouterr().err


def lmjax(*arguments: str) -> int:
    """The exit code of `python -m lmjax`, in this process."""
    with pytest.raises(SystemExit) as ended:
        verbs.main(arguments)
    return ended.value.code or cli.DONE


# --- Bad input ---


def command(*flags: str) -> int:
    """The exit code of the command, in this process."""
    return cli.guarded(lambda: ablation_cli._run_ablation(MODULE, tiny_ablation.ablation, flags))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--precision", "f32"], ["precision"]),
        (["--processes", "0"], ["processes is 0"]),
        (["--threads", "0"], ["threads is 0"]),
        (["--seeds", "0,0"], ["seeds are (0, 0)", "twice"]),
        (["--seeds", "0-2"], ["'0-2'", "0,1,2"]),
        (["--max-seeds", "1"], ["max_seeds is 1", "2 seeds"]),
        (["--steps", "0"], ["steps is 0"]),
        (["--steps", "many"], ["steps", "many"]),
        (["--slurm-options", "a=b"], ["--slurm, which is missing"]),
        (["--slurm", "--slurm-options", "partition"], ["'partition'", "NAME=VALUE"]),
    ],
)
def test_bad_flags(
    flags: Sequence[str],
    words: Sequence[str],
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(home)
    workdir = tmp_path / "ablation"
    assert command("--workdir", str(workdir), *flags) == cli.BAD_INPUT
    err = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in err] == [True]
    assert all(word in err[0] for word in words), err
    assert not workdir.exists()


def test_a_missing_text_and_a_foreign_directory_exit_2(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("--workdir", str(tmp_path / "ablation")) == cli.BAD_INPUT
    assert "texts" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

    monkeypatch.chdir(home)
    (tmp_path / "letter.txt").write_text("mine")
    assert command("--workdir", str(tmp_path)) == cli.BAD_INPUT
    assert "is not empty and holds no ablation" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_dry_run_prints_arms_and_cells_and_writes_nothing(
    home: Path, undisturbed: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--workdir", str(tmp_path / "new"), "--dry-run", "--seeds", "0,1,2") == cli.DONE
    out = capsys.readouterr().out
    assert table(out)[1:] == [["f32", *["missing"] * 3], ["bf16", *["missing"] * 3]]
    assert ["bf16", "p=f32,c=bf16,o=f32"] in [line.split() for line in out.splitlines()]
    assert list(tmp_path.iterdir()) == []

    assert command("--workdir", str(undisturbed[0]), "--dry-run", "--seeds", "0,1,2") == cli.DONE
    assert table(capsys.readouterr().out) == [
        [*row, *more]
        for row, more in zip(
            table(undisturbed[1]), (["seed", "2"], *[["missing"]] * 2), strict=True
        )
    ]


def test_an_error_in_a_worker_stops_the_ablation_with_its_line(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No vocabulary is too small before a worker has seen both it and the text."""
    monkeypatch.chdir(home)
    chosen = tiny_ablation.ablation()
    small = dataclasses.replace(chosen.base.model, vocab_size=64)
    arms = {arm: dataclasses.replace(config, model=small) for arm, config in chosen.arms.items()}
    broken = dataclasses.replace(chosen, base=arms["f32"], arms=arms)
    with pytest.raises(runner.InputError, match="256 tokens, but the model embeds 64"):
        runner.run(broken, tmp_path, progress=False)
